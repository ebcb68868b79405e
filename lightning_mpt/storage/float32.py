"""Master weights as a plain FP32 copy: 4 bytes per parameter."""

import torch
from torch import Tensor

from .masters import round_to_half


class Float32Masters:
    """The stored tensor is the master, and is updated where it lies."""

    name = "float32"
    dtype = torch.float32
    bytes_per_parameter = 4
    exact = True

    def of_half(self, half: Tensor) -> Tensor:
        return half.float()

    def decode(self, half: Tensor, stored: Tensor, out: Tensor, scratch: Tensor) -> Tensor:
        return stored

    def encode(
        self, master: Tensor, half: Tensor, stored: Tensor, scratch: Tensor, dither: Tensor | None = None
    ) -> None:
        round_to_half(master, half, scratch)
        if master is not stored:
            stored.copy_(master)
