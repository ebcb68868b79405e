"""How a master weight is stored beside its half weight, and how AdamW's moments are: encode, decode, bytes.

| master_weights | bytes per parameter | together with the half weight |
| --- | --- | --- |
| `float32` | 4 | a plain copy |
| `split` | 2 | the FP32 master, exactly (`split.py`) |
| `split8` | 1 | its first 24 bits (`split8.py`) |

| optimizer_state | bytes per parameter | both moments |
| --- | --- | --- |
| `float32` | 8 | as in torch.optim.AdamW |
| `bfloat16` | 4 | their upper halves (`bfloat16_moments.py`) |
| `8bit` | 2.06 | codes with a scale for every 128 (`block8.py`) |

Lossy formats are rounded with dither within a step (`dither.py`). A further format is a further file, named here, and
its load and store functions for the kernel.
"""

from .bfloat16_moments import BFloat16Moments
from .block8 import Block8Moments
from .float32 import Float32Masters
from .float32_moments import Float32Moments
from .masters import HALF_DTYPES, MasterStorage, fp32_to, half_to_fp32, is_float, is_half, round_to_half
from .moments import Moment, MomentStorage, zeros
from .split import SplitMasters
from .split8 import Split8Masters

MASTER_STORAGES: dict[str, MasterStorage] = {
    storage.name: storage for storage in (Float32Masters(), SplitMasters(), Split8Masters())
}
MOMENT_STORAGES: dict[str, MomentStorage] = {
    storage.name: storage for storage in (Float32Moments(), BFloat16Moments(), Block8Moments())
}


def master_storage(name: str) -> MasterStorage:
    """The storage of masters called `name`; ValueError with the names there are otherwise."""
    try:
        return MASTER_STORAGES[name]
    except (KeyError, TypeError):
        known = ", ".join(repr(known) for known in MASTER_STORAGES)
        raise ValueError(f"master_weights={name!r} is not a way to store master weights: use one of {known}.") from None


def moment_storage(name: str) -> MomentStorage:
    """The storage of moments called `name`; ValueError with the names there are otherwise."""
    try:
        return MOMENT_STORAGES[name]
    except (KeyError, TypeError):
        known = ", ".join(repr(known) for known in MOMENT_STORAGES)
        raise ValueError(f"optimizer_state={name!r} is not a way to store the moments: use one of {known}.") from None


__all__ = [
    "HALF_DTYPES",
    "MASTER_STORAGES",
    "MOMENT_STORAGES",
    "MasterStorage",
    "Moment",
    "MomentStorage",
    "fp32_to",
    "half_to_fp32",
    "is_float",
    "is_half",
    "master_storage",
    "moment_storage",
    "round_to_half",
    "zeros",
]
