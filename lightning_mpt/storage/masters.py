"""What every storage of master weights can do, and the one rounding from FP32 to half that all of them share."""

from typing import Any, Protocol

import torch
from torch import Tensor

HALF_DTYPES = (torch.float16, torch.bfloat16)


class MasterStorage(Protocol):
    """A way to keep the FP32 master of a half weight.

    Where nothing else is said, tensors are flat (one dimension, contiguous) and equally long, on one device. `half` is
    float16 or bfloat16, `stored` is of `dtype`, `master` and `scratch` are float32. `decode(encode(x)) == x` for every
    x that `decode` can return, and the codes are then the same, so saving and loading a master changes nothing.
    """

    name: str
    dtype: torch.dtype
    bytes_per_parameter: int
    exact: bool
    """Whether every FP32 master is kept bit for bit; else encoding rounds, and takes dither."""

    def of_half(self, half: Tensor) -> Tensor:
        """What is stored beside `half` (any shape) if the master is exactly the half weight's value. A new tensor."""
        ...

    def decode(self, half: Tensor, stored: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
        """The FP32 master of `half` and `stored`.

        Returns `out`, or, where the storage *is* the master, `stored` itself: what is written there is stored.
        `scratch` is overwritten.
        """
        ...

    def encode(
        self, master: Tensor, half: Tensor, stored: Tensor, scratch: Tensor, dither: Tensor | None = None
    ) -> None:
        """Write `master` as `half` and `stored`. `scratch` is overwritten, and `master` where it is not `stored`.

        `dither` (int32, see `dither.py`): thresholds that a lossy format rounds by within a step; None: to nearest.
        """
        ...


def is_half(value: Any) -> bool:
    """Whether `value`, which may be anything, is a half tensor."""
    return isinstance(value, Tensor) and value.dtype in HALF_DTYPES


def is_float(tensor: Tensor) -> bool:
    """Whether its numbers are computed with: float8 is only kept, as by quantized weights, and is left alone."""
    return tensor.is_floating_point() and tensor.itemsize > 1


def half_to_fp32(value: Any) -> Any:
    """A half tensor in FP32; anything else as it is."""
    return value.float() if is_half(value) else value


def fp32_to(dtype: torch.dtype, value: Any) -> Any:
    """An FP32 tensor in `dtype`; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def round_to_half(master: Tensor, half: Tensor, scratch: Tensor) -> None:
    """Round `master` (float32) into `half`, nearest. All flat and equally long; `scratch` (float32) is overwritten.

    Ties go to even in float16, as torch rounds, and away from zero in bfloat16. There, ties to even cannot be undone
    from 16 bits (the remainder would need 65537 values), and all storages round alike so that they train alike: one
    weight in 131072 is rounded the other way than by `Tensor.bfloat16()`, and is as near.
    """
    if half.dtype == torch.bfloat16:
        round_to_half_(scratch.copy_(master), half)
    else:
        half.copy_(master)


def round_to_half_(master: Tensor, half: Tensor) -> None:
    """As `round_to_half`, with `master` itself for scratch: it is overwritten."""
    if half.dtype == torch.bfloat16:
        # torch rounds ties to even. The last of the 16 bits to go breaks every tie upward, and changes nothing else.
        master.view(torch.int32).bitwise_or_(1)
    half.copy_(master)
