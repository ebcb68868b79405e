"""Moments in bfloat16: 4 bytes per parameter for both, lossy.

8 significant bits, so a rounding to nearest is off by 2**-9 at most. exp_avg_sq moves by a thousandth of itself a step
(beta2 = 0.999), less than that: rounded to nearest it would never fall. It is rounded with dither (`dither.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import Moment


class BFloat16Moments:
    """The upper half of the FP32 bits."""

    name = "bfloat16"
    bytes_per_parameter = 4.0
    block = 1
    exact = False
    scratch_rows = 1

    def dtype(self, *, signed: bool) -> torch.dtype:
        return torch.bfloat16

    def decode(self, stored: Moment, out: Tensor, *, signed: bool) -> Tensor:
        return out.copy_(stored.codes)

    def encode(
        self, value: Tensor, stored: Moment, scratch: Sequence[Tensor], dither: Tensor | None, *, signed: bool
    ) -> None:
        if dither is not None:
            bits = value.view(torch.int32)
            threshold = torch.bitwise_right_shift(dither, 16, out=scratch[0].view(torch.int32)).bitwise_and_(0xFFFF)
            bits.add_(threshold).bitwise_and_(-0x10000)
        stored.codes.copy_(value)
