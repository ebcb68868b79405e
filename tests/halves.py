"""Half values for the tests of what stands for FP32 copies of such."""

from collections.abc import Callable

import torch
from torch import Tensor

SHAPE = (4, 6)
Step = Callable[[Tensor], Tensor]


def half(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A leaf of half values."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()
