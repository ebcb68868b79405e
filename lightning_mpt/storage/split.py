"""Split master weights: the half weight and a 16-bit correction are the FP32 master. 2 bytes per parameter.

bfloat16 is the upper half of a float32, so the correction is the lower half as it is:

    FP32 master   s eeeeeeee mmmmmmm mmmmmmmmmmmmmmmm
    bf16 weight   s eeeeeeee mmmmmmm                      (bits + 0x8000) >> 16: nearest, ties away from zero
    correction                       mmmmmmmmmmmmmmmm     bits & 0xffff

Read as a signed number the correction is negative exactly where the weight was rounded up, so
`(weight << 16) + correction` gives back the bits, always: every value whose rounding is finite.

float16 has a narrower exponent, so the correction counts in 2**-15 of a unit in the last place (ulp) of the weight:

    correction = (master - half) * 2**15 / ulp(half)      within +-2**14, since |master - half| <= ulp / 2

That is finer than FP32's own grid where 2**-16 <= |master| <= 65504: there the correction is a whole number and nothing
is lost. Below, the unit is 2**-39 (a subnormal's ulp is 2**-24), and the master is within 2**-40 of what it was. The
master is rounded to that grid *before* it is rounded to half, so that decoding and encoding again gives the same codes.
"""

import math

import torch
from torch import Tensor

from .masters import round_to_half, round_to_half_

FP16_EXPONENT_BITS = 0x7C00
FP16_MANTISSA_LENGTH = 10
FP32_MANTISSA_LENGTH = 23
FP32_EXPONENT_BIAS = 127
FP16_ULP_EXPONENT = 25
UNIT_BITS = 15
"""A unit of the correction is 2**-15 ulp of the half weight."""
FINEST_UNIT = 2.0**-39
"""That of the smallest weights: an ulp of float16's subnormals is 2**-24."""
CORRECTION_LIMIT = 2.0**14


class SplitMasters:
    """A correction of 16 bits (int16): the lower half of the FP32 bits (bf16), or 2**-15 ulp of the weight (fp16)."""

    name = "split"
    dtype = torch.int16
    bytes_per_parameter = 2
    exact = True

    def of_half(self, half: Tensor) -> Tensor:
        return torch.zeros_like(half, dtype=self.dtype)

    def decode(self, half: Tensor, stored: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
        if half.dtype == torch.bfloat16:
            out.copy_(half)  # exactly the bits of the half weight, shifted up
            out.view(torch.int32).add_(scratch.view(torch.int32).copy_(stored))
            return keep_written_zeros_(out, half)
        unit(half, UNIT_BITS, scratch)
        return out.copy_(stored).mul_(scratch).add_(half)

    def encode(
        self, master: Tensor, half: Tensor, stored: Tensor, scratch: Tensor, dither: Tensor | None = None
    ) -> None:
        if half.dtype == torch.bfloat16:
            stored.copy_(master.view(torch.int32))  # the conversion keeps the lower 16 bits
            round_to_half_(master, half)
            return
        # To the grid, which changes nothing from 2**-16 up; and -0 becomes 0, since decoding it gives that.
        master.div_(FINEST_UNIT).round_().mul_(FINEST_UNIT).add_(0.0)
        round_to_half(master, half, scratch)
        master.sub_(half).mul_(units_per(half, UNIT_BITS, scratch))
        # The limit matters only to a weight that left fp16's range: its half is inf, and stays so.
        stored.copy_(master.clamp_(-CORRECTION_LIMIT, CORRECTION_LIMIT))


def keep_written_zeros_(master: Tensor, half: Tensor) -> Tensor:
    """Make decoded masters of bfloat16 weights 0 where the weight is 0 and its correction was negative.

    No master has such codes, so somebody else wrote that 0 (a mask, through `.data`): bits below its own are a NaN's.
    """
    if not math.isfinite(master.sum()):  # to look for such zeros in every step would take longer than AdamW does
        written = half.eq(0).logical_and_(master.isnan())
        torch.where(written, half.float(), master, out=master)
    return master


def unit(half: Tensor, bits: int, out: Tensor) -> Tensor:
    """2**-bits of a unit in the last place of float16 numbers, in `out` (float32)."""
    exponent = _biased_exponent(half, out.view(torch.int32))
    # A number with the biased exponent e has the ulp 2**(e - 25), subnormals that of e = 1.
    exponent.add_(FP32_EXPONENT_BIAS - FP16_ULP_EXPONENT - bits).bitwise_left_shift_(FP32_MANTISSA_LENGTH)
    return out


def units_per(half: Tensor, bits: int, out: Tensor) -> Tensor:
    """One over `unit`: how many of them make 1, in `out` (float32)."""
    exponent = _biased_exponent(half, out.view(torch.int32))
    exponent.neg_().add_(FP32_EXPONENT_BIAS + FP16_ULP_EXPONENT + bits).bitwise_left_shift_(FP32_MANTISSA_LENGTH)
    return out


def _biased_exponent(half: Tensor, out: Tensor) -> Tensor:
    """The biased exponents of float16 numbers, 1 for subnormals, in `out` (int32)."""
    out.copy_(half.view(torch.int16))
    return out.bitwise_and_(FP16_EXPONENT_BITS).bitwise_right_shift_(FP16_MANTISSA_LENGTH).clamp_(min=1)
