"""What every storage of AdamW's moments can do, and how a stored moment is held."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Moment(NamedTuple):
    """A moment as it is stored."""

    codes: Tensor
    """The parameter's shape and order in memory; of the storage's dtype."""
    scales: Tensor | None = None
    """float32, one for each block of codes in the order of memory; None where a code says all."""


class MomentStorage(Protocol):
    """A way to keep exp_avg (signed) and exp_avg_sq, and with AMSGrad its maximum (never negative).

    To `decode` and `encode`, codes are flat and fill whole blocks; values are float32 and as many.
    `decode(encode(x)) == x` for every x that `decode` can return, and the codes are then the same, so that saving
    moments in FP32 and loading them changes nothing.
    """

    name: str
    bytes_per_parameter: float
    """Of both moments together."""
    block: int
    """How many elements share a scale; 1 where none do."""
    exact: bool
    """Whether the codes are the FP32 values, to be updated where they lie."""
    scratch_rows: int
    """How many float32 numbers an element `encode` works in."""

    def dtype(self, *, signed: bool) -> torch.dtype:
        """What codes are."""
        ...

    def decode(self, stored: Moment, out: Tensor, *, signed: bool) -> Tensor:
        """The values: in `out`, or, where the codes *are* the values, the codes themselves."""
        ...

    def encode(
        self, value: Tensor, stored: Moment, scratch: Sequence[Tensor], dither: Tensor | None, *, signed: bool
    ) -> None:
        """Write `value` to `stored`. Overwrites `value` and `scratch`: `scratch_rows` float32 tensors as long as it.

        `dither` (int32, see `dither.py`): thresholds to round by within a step; None: to nearest.
        """
        ...


def zeros(storage: MomentStorage, parameter: Tensor, *, signed: bool) -> Moment:
    """A moment of nothing but zeros, for a dense parameter."""
    codes = torch.zeros_like(parameter, dtype=storage.dtype(signed=signed))
    if storage.block == 1:
        return Moment(codes)
    count = blocks(parameter.numel(), storage.block)
    return Moment(codes, torch.zeros(count, dtype=torch.float32, device=parameter.device))


def blocks(numel: int, block: int) -> int:
    """How many blocks `numel` elements fill, the last perhaps in part."""
    return -(-numel // block)
