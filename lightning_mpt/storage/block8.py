"""Moments in 8 bits: codes that are fine near zero, and an FP32 scale for each block of 128. 2.06 bytes per parameter.

    exp_avg       scale * sign(c) * (|c| / 127)**2      c of int8
    exp_avg_sq    scale * (c / 255)**4                  c of uint8

The scale is the block's largest magnitude, in FP32, which flushes no second moment to zero. The largest element's code
is the last one, whose value is the scale exactly, so encoding decoded moments again gives the same scale and codes.

The powers make room for small elements beside large ones. The update divides by the root of exp_avg_sq, and both roots
are then alike: quadratic codes, that reach down to 6e-5 (exp_avg) and 1.5e-5 (root of exp_avg_sq) of the block's
largest. exp_avg_sq never becomes zero by rounding: with exp_avg not zero beside it, the next update would be far too
large.

Between two codes it is the *value* that decides, so with dither (`dither.py`) moments are right on average. Rounded to
nearest, exp_avg_sq would stand still wherever the codes are further apart than a step of 1 - beta2.

Worst rounding to nearest, of a value v in a block whose largest is s: half the gap between neighbours, which is about
sqrt(v s) / 63.5 for exp_avg, and v (s / v)**(1/4) / 63.75 for exp_avg_sq.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .dither import uniform_
from .moments import Moment

BLOCK = 128
SIGNED_LIMIT = 127
UNSIGNED_LIMIT = 255


class Block8Moments:
    """Codes of 8 bits with a float32 scale for every 128."""

    name = "8bit"
    bytes_per_parameter = 2 * (1 + 4 / BLOCK)
    block = BLOCK
    exact = False
    scratch_rows = 4

    def dtype(self, *, signed: bool) -> torch.dtype:
        return torch.int8 if signed else torch.uint8

    def decode(self, stored: Moment, out: Tensor, *, signed: bool) -> Tensor:
        out.copy_(stored.codes)
        if signed:
            out.mul_(out.abs()).mul_(1 / SIGNED_LIMIT**2)
        else:
            _fourth_power(out)
        _by_block(out).mul_(_scales(stored))
        return out

    def encode(
        self, value: Tensor, stored: Moment, scratch: Sequence[Tensor], dither: Tensor | None, *, signed: bool
    ) -> None:
        share, code, below, above = scratch[: self.scratch_rows]
        torch.abs(value, out=share)
        torch.amax(_by_block(share), 1, keepdim=True, out=_scales(stored))
        scales = _scales(stored)
        _by_block(share).div_(scales + (scales == 0))  # exactly 1 for the largest
        if signed:
            torch.sqrt(share, out=code).mul_(SIGNED_LIMIT).floor_()
            torch.mul(code, code, out=below).mul_(1 / SIGNED_LIMIT**2)
            torch.add(code, 1, out=above)
            above.mul_(above).mul_(1 / SIGNED_LIMIT**2)
        else:
            torch.sqrt(share, out=code).sqrt_().mul_(UNSIGNED_LIMIT).floor_()
            _fourth_power(below.copy_(code))
            _fourth_power(torch.add(code, 1, out=above))
        # Up if share > below + u (above - below), u being the threshold.
        above.sub_(below)
        share.sub_(below)
        above.mul_(uniform_(below, dither))
        code.add_(torch.gt(share, above, out=above))
        if signed:
            stored.codes.copy_(code.clamp_(max=SIGNED_LIMIT).copysign_(value))
        else:
            torch.maximum(code, value.sign_(), out=code)  # 1 at least, where the value is not 0
            stored.codes.copy_(code.clamp_(max=UNSIGNED_LIMIT))


def _fourth_power(codes: Tensor) -> Tensor:
    """(c / 255)**4 in place: exactly 1 for the last code."""
    codes.mul_(codes).mul_(1 / UNSIGNED_LIMIT**2)
    return codes.mul_(codes)


def _by_block(values: Tensor) -> Tensor:
    return values.view(-1, BLOCK)


def _scales(stored: Moment) -> Tensor:
    assert stored.scales is not None
    return stored.scales.view(-1, 1)
