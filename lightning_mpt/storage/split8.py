"""Master weights of 24 bits: the half weight and a correction of 8 bits. 1 byte per parameter, lossy.

bfloat16: the master is a float32 whose last 8 bits are zero, so the correction is the third byte as it is:

    FP32 master   s eeeeeeee mmmmmmm mmmmmmmm 00000000
    bf16 weight   s eeeeeeee mmmmmmm                      nearest, ties away from zero, as `split.py` explains
    correction                       mmmmmmmm             (weight << 16) + (correction << 8) gives back the bits

float16: the correction counts in 2**-8 of a unit in the last place (ulp) of the weight. It stays within +-127, short of
the tie, where decoding and encoding again could choose the other neighbour.

Worst error of the nearest master, as a share of the power of two below it: 2**-16 in bfloat16 (half a code); in float16
2**-18 (half a code, and a whole one about the ties and above powers of two), in its subnormals 2**-32. An update may be
smaller than that, so within the step masters are rounded with dither (see `dither.py`): they move on average as they
should, and are off by at most twice that.
"""

import torch
from torch import Tensor

from .dither import uniform_
from .masters import round_to_half, round_to_half_
from .split import keep_written_zeros_, unit, units_per

LIMIT = 127
UNIT_BITS = 8
"""A unit of the correction is 2**-8 ulp of the half weight."""


class Split8Masters:
    """A correction of 8 bits (int8): the third byte of the FP32 bits (bf16), or 2**-8 ulp of the weight (fp16)."""

    name = "split8"
    dtype = torch.int8
    bytes_per_parameter = 1
    exact = False

    def of_half(self, half: Tensor) -> Tensor:
        return torch.zeros_like(half, dtype=self.dtype)

    def decode(self, half: Tensor, stored: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
        if half.dtype == torch.bfloat16:
            out.copy_(half)
            out.view(torch.int32).add_(scratch.view(torch.int32).copy_(stored).bitwise_left_shift_(8))
            return keep_written_zeros_(out, half)
        unit(half, UNIT_BITS, scratch)
        return out.copy_(stored).mul_(scratch).add_(half)

    def encode(
        self, master: Tensor, half: Tensor, stored: Tensor, scratch: Tensor, dither: Tensor | None = None
    ) -> None:
        if half.dtype == torch.bfloat16:
            bits = master.view(torch.int32)
            if dither is None:
                bits.add_(0x80)
            else:
                last_byte = torch.bitwise_right_shift(dither, 24, out=scratch.view(torch.int32))
                bits.add_(last_byte.bitwise_and_(0xFF))
            bits.bitwise_right_shift_(8)
            stored.copy_(bits)  # the conversion keeps the lower 8 bits
            bits.bitwise_left_shift_(8)
            round_to_half_(master, half)
            return
        round_to_half(master, half, scratch)
        half.add_(0.0)  # -0 becomes 0, since decoding it gives that
        master.sub_(half).mul_(units_per(half, UNIT_BITS, scratch))
        master.add_(uniform_(scratch, dither)).floor_()
        stored.copy_(master.clamp_(-LIMIT, LIMIT))
