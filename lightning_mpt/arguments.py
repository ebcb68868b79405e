"""What a plugin's arguments may be, where a type alone does not say it."""

from typing import Any

from torch import nn

from .fp32_modules import RUNNING_NORMS


def flag(name: str, given: Any) -> bool:
    """`given`, if it is a bool: a text such as "no" would count as True. ValueError where it is something else."""
    if not isinstance(given, bool):
        raise ValueError(f"{name}={given!r} must be True or False.")
    return given


def module_types(given: Any) -> tuple[type[nn.Module], ...]:
    """The module types that a user's `fp32_modules` means. ValueError where it is something else."""
    if given is None:
        return RUNNING_NORMS
    types = (given,) if isinstance(given, type) else given
    if not isinstance(types, tuple | list) or not all(isinstance(t, type) and issubclass(t, nn.Module) for t in types):
        raise ValueError(
            f"fp32_modules={given!r} must be module types, such as (torch.nn.BatchNorm2d, torch.nn.LayerNorm)."
        )
    return tuple(types)
