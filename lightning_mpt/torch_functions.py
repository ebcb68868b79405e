"""Torch's functions, by name, and what takes their place while a module trains in half."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., Any]
Way = Callable[[Function, tuple[Any, ...], dict[str, Any]], Any]
"""How a function is called with the arguments that the caller gave."""


def named(names: str) -> frozenset[Any]:
    """The functions of these names in `torch.linalg` and `torch`, and as methods of tensors."""
    owners = (torch.linalg, torch, Tensor)
    return frozenset(getattr(owner, name) for owner in owners for name in names.split() if hasattr(owner, name))
