"""Dither: the threshold at which an update is rounded up, so that what a lossy format cannot hold is not lost.

A moment that moves by a thousandth a step stands still in a format whose neighbours are a hundredth apart, if every
step rounds to the nearest: so does a master under a small learning rate. Rounded up with the probability of the
remainder instead, it moves on average as it should. The thresholds need not be random, only even: here element `i` at
step `t` has the 32 bits of

    i * INDEX_STRIDE + t * STEP_STRIDE  (mod 2**32)

the two-dimensional sequence of lowest discrepancy by Roberts' construction (the strides are 2**32 over the plastic
number and over its square). So an element that moves a tenth of a step each time is rounded up every tenth time, with
less noise than random rounding has, and a resumed run takes the very same thresholds. `i` counts within a parameter,
in the order of memory, so thresholds do not depend on how parameters are packed together.
"""

import torch
from torch import Tensor

INDEX_STRIDE = 0xC13FA9A9
STEP_STRIDE = 0x91E10DA5
STREAM_STRIDE = 0x40000000
"""Added to the bits once for exp_avg, twice for exp_avg_sq, three times for its maximum: they and the master are not
rounded up together."""


def ramp(length: int, device: torch.device) -> Tensor:
    """The bits of the first `length` elements at step 0: int32."""
    return torch.arange(length, dtype=torch.int32, device=device).mul_(signed(INDEX_STRIDE))


def offset(start: int, step: Tensor) -> Tensor:
    """What to add to the ramp for elements from `start` on at `step` (float32, no dimensions): int32, on its device."""
    bits = step.to(torch.int64) * STEP_STRIDE + signed(start * INDEX_STRIDE)
    return bits.bitwise_and_(0xFFFFFFFF).to(torch.int32)


def uniform_(out: Tensor, bits: Tensor | None) -> Tensor:
    """Thresholds in [0, 1) of `bits` (int32) in `out` (float32, not the same memory); without bits 1/2: to nearest."""
    if bits is None:
        return out.fill_(0.5)
    as_int = out.view(torch.int32)
    torch.bitwise_right_shift(bits, 8, out=as_int)
    return out.copy_(as_int.bitwise_and_(0xFFFFFF)).mul_(2.0**-24)


def signed(value: int) -> int:
    """The lower 32 bits of a number as a signed one."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)
