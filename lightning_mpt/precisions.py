"""Precisions by name, for the command line, the examples and the benchmarks.

Lightning's own, as `Trainer(precision=...)` takes them, and ours: `mpt-16-true` and `mpt-bf16-true`, each perhaps with
a preset: `mpt-bf16-true:compact`.
"""

from difflib import get_close_matches
from typing import Any

from .presets import PRESETS

LIGHTNING = ("32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true")
OURS = ("mpt-16-true", "mpt-bf16-true")
NAMES = (*LIGHTNING, *OURS, *(f"{name}:{preset}" for name in OURS for preset in PRESETS))


def check_name(name: str) -> str:
    """`name`, if it is one of NAMES; else ValueError with those that are like it."""
    if name not in NAMES:
        like = get_close_matches(name, NAMES, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(map(repr, like))}?" if like else ""
        raise ValueError(
            f"precision {name!r} is not one of {', '.join((*LIGHTNING, *OURS))}, or an mpt- one with "
            f":{' or :'.join(PRESETS)}.{hint}"
        )
    return name


def trainer_arguments(name: str, **options: Any) -> dict[str, Any]:
    """What to give the Trainer for a precision of that name.

    Args:
        name: one of NAMES.
        options: of `MasterWeightPrecision`, over those of the preset. Only for ours.

    Raises:
        ValueError: an unknown name; options beside a precision of Lightning's.
    """
    check_name(name)
    if name in LIGHTNING:
        if options:
            raise ValueError(
                f"{', '.join(options)} cannot be with precision {name!r}: these are for {', '.join(OURS)}."
            )
        return {"precision": name}
    from .precision import MasterWeightPrecision  # here, since Lightning takes seconds to import

    precision, _, preset = name.removeprefix("mpt-").partition(":")
    return {"plugins": [MasterWeightPrecision(precision, **{**PRESETS[preset or "exact"], **options})]}  # type: ignore[arg-type]
