"""How large gradients are, as powers of two: counted on the device, and what a loss scale would make of the counts.

fp16 is zero below 2**-24 and inf above 65504. A histogram of exponents says what that costs, and what scaling by S, a
shift of the histogram by log2(S), saves at the lower end and loses at the upper: figure 3 of *Mixed Precision Training*
(Micikevicius et al., arXiv 1710.03740).

A gradient of a loss that was scaled by s is divided by s as it is counted, in whole numbers: with g = m * 2**e and
s = n * 2**d, where m and n are at least 1/2 and below 1, the exponent of g / s is e - d, or e - d - 1 where m < n.
Nothing is rounded, for any s; a power of two just shifts the bins.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .pieces import piece_length, pieces
from .shards import local

LOWEST, HIGHEST = -149, 127
"""Exponents of FP32: 2**-149 is its smallest number. What is beyond is counted with the last ones."""
FP16_LOWEST, FP16_HIGHEST = -24, 15
FP16_LARGEST = 65504.0
_BINS = HIGHEST - LOWEST + 3
"""Zero, the exponents from the lowest, and what is not finite."""


class ExponentCounter:
    """Counts exponents on a device. Adding waits for nothing; `read` waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64, device=device)
        self.largest = torch.zeros((), dtype=torch.float32, device=device)
        self._one = torch.ones((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, values: Tensor, scale: Tensor | None = None) -> None:
        """Count `values / scale`.

        Args:
            values: of any shape, strided or sparse, floating (float64 is looked at in float32), on the counter's
                device; of a DTensor, what this process holds. Not changed.
            scale: float32 without dimensions, positive; None for 1.
        """
        held = local(values if values.layout == torch.strided else values.to_dense()).reshape(-1)
        if scale is not None:
            scale = scale.to(held.device, non_blocking=True)
        for piece in pieces(held.numel(), piece_length([held], rows=6)) if held.numel() else ():
            self._add(held[piece].float(), scale)

    def _add(self, values: Tensor, scale: Tensor | None) -> None:
        finite = values.isfinite()
        mantissa, exponent = torch.frexp(values)
        exponent = exponent - 1
        largest = torch.where(finite, values, 0.0).abs().amax()
        if scale is not None:
            scale_mantissa, scale_exponent = torch.frexp(scale)
            exponent = exponent - (scale_exponent - 1) - (mantissa.abs() < scale_mantissa).int()
            largest = largest / scale
        bins = exponent.clamp(LOWEST, HIGHEST) - (LOWEST - 1)
        bins = torch.where(finite, torch.where(values == 0, 0, bins), _BINS - 1)
        # Not bincount and not histc: the one asks the device how many bins there are, the other counts in floats.
        self.counts.scatter_add_(0, bins.long(), self._one.expand(values.numel()))
        self.largest = torch.maximum(self.largest, largest)

    def read(self) -> "ExponentHistogram":
        zeros, *counts, not_finite = self.counts.tolist()
        return ExponentHistogram(zeros, tuple(counts), not_finite, self.largest.item())


class Shares(NamedTuple):
    """Parts of all values; they sum to 1, or are all 0 where there is no value."""

    zero: float
    below: float
    """Not zero, and smaller than fp16's smallest number, 2**-24."""
    inside: float
    above: float
    """2**16 and more: inf in fp16. What is from 65520 up to that is inf too, and in the last bin `inside`."""
    not_finite: float


@dataclass(frozen=True)
class ExponentHistogram:
    """How many values have which exponent, floor(log2(abs(value)))."""

    zeros: int
    counts: tuple[int, ...]
    """Of the exponents from `LOWEST` to `HIGHEST`."""
    not_finite: int
    largest: float
    """The largest finite magnitude."""

    @classmethod
    def sum(cls, histograms: Iterable["ExponentHistogram"]) -> "ExponentHistogram":
        """All of their values in one."""
        several = [cls(0, (0,) * (HIGHEST - LOWEST + 1), 0, 0.0), *histograms]
        return cls(
            sum(one.zeros for one in several),
            tuple(map(sum, zip(*(one.counts for one in several), strict=True))),
            sum(one.not_finite for one in several),
            max(one.largest for one in several),
        )

    @property
    def total(self) -> int:
        return self.zeros + sum(self.counts) + self.not_finite

    def between(self, lowest: int, highest: int) -> int:
        """How many values have an exponent from `lowest` to `highest`, both included."""
        return sum(self.counts[max(lowest - LOWEST, 0) : max(highest - LOWEST + 1, 0)])

    def shares(self, scale: float = 1.0) -> Shares:
        """Where the values are in fp16 once they are multiplied by `scale`.

        Raises:
            ValueError: `scale` is not a power of two, which would split bins.
        """
        mantissa, exponent = math.frexp(scale) if 0 < scale < math.inf else (0.0, 0)
        if mantissa != 0.5:
            raise ValueError(f"scale={scale!r} must be a power of two, which shifts the exponents: such as 1024.0.")
        lowest, highest = FP16_LOWEST - (exponent - 1), FP16_HIGHEST - (exponent - 1)
        parts = (
            self.zeros,
            self.between(LOWEST, lowest - 1),
            self.between(lowest, highest),
            self.between(highest + 1, HIGHEST),
            self.not_finite,
        )
        return Shares(*(part / max(self.total, 1) for part in parts))

    def saved(self, scale: float) -> float:
        """The part of all values that is below fp16's range, and not below once multiplied by `scale`."""
        return self.shares().below - self.shares(scale).below

    def lost(self, scale: float) -> float:
        """The part of all values that is inf in fp16 only because it is multiplied by `scale`."""
        return self.shares(scale).above - self.shares().above

    def constant_scale(self, head_room: float = 1.0) -> float | None:
        """The largest power of two S with S * `largest` * `head_room` < 65504; None where every value is zero.

        At most 2**127, FP32's largest power of two.
        """
        reach = self.largest * head_room
        if not 0 < reach < math.inf:
            return None
        exponent = min(math.frexp(FP16_LARGEST)[1] - math.frexp(reach)[1] + 1, HIGHEST)
        while math.ldexp(reach, exponent) >= FP16_LARGEST:
            exponent -= 1
        return math.ldexp(1.0, exponent)
