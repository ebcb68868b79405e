"""How a master weight is stored beside its half weight: encode, decode, bytes per parameter.

| name | bytes per parameter | together with the half weight |
| --- | --- | --- |
| `float32` | 4 | a plain copy |
| `split` | 2 | the FP32 master, exactly (see `split.py`) |
"""

from .float32 import Float32Masters
from .masters import HALF_DTYPES, MasterStorage, round_to_half
from .split import SplitMasters

MASTER_STORAGES: dict[str, MasterStorage] = {storage.name: storage for storage in (Float32Masters(), SplitMasters())}

OPTIMIZER_STATES = ("float32",)
"""How AdamW's moments may be stored: `float32` is 8 bytes per parameter for both."""


def master_storage(name: str) -> MasterStorage:
    """The storage called `name`; ValueError with the names there are otherwise."""
    try:
        return MASTER_STORAGES[name]
    except (KeyError, TypeError):
        known = ", ".join(repr(known) for known in MASTER_STORAGES)
        raise ValueError(f"master_weights={name!r} is not a way to store master weights: use one of {known}.") from None


def check_optimizer_state(name: str) -> str:
    """`name` if moments can be stored that way; ValueError with the names there are otherwise."""
    if name not in OPTIMIZER_STATES:
        known = ", ".join(repr(known) for known in OPTIMIZER_STATES)
        raise ValueError(f"optimizer_state={name!r} is not a way to store the moments: use one of {known}.")
    return name


__all__ = [
    "HALF_DTYPES",
    "MASTER_STORAGES",
    "MasterStorage",
    "check_optimizer_state",
    "master_storage",
    "round_to_half",
]
