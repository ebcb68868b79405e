"""Moments in FP32: 8 bytes per parameter for both, as in torch.optim.AdamW."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .moments import Moment


class Float32Moments:
    """The codes are the values, updated where they lie."""

    name = "float32"
    bytes_per_parameter = 8.0
    block = 1
    exact = True
    scratch_rows = 0

    def dtype(self, *, signed: bool) -> torch.dtype:
        return torch.float32

    def decode(self, stored: Moment, out: Tensor, *, signed: bool) -> Tensor:
        return stored.codes

    def encode(
        self, value: Tensor, stored: Moment, scratch: Sequence[Tensor], dither: Tensor | None, *, signed: bool
    ) -> None:
        if value is not stored.codes:
            stored.codes.copy_(value)
