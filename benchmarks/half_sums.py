"""Products whose sums are half, too: what *Mixed Precision Training* says not to do, and every product here avoids.

A unit that multiplies half matrices into a half accumulator adds a few products exactly, and rounds at every such
chunk. That is what this does: `TERMS` products, exact and summed in FP32, are rounded to half, added to a half
accumulator, and the sum is rounded to half, chunk after chunk. The last axis of sums is in order, so a long one
(over the tokens of a batch, in the gradient of a weight) stalls once it is far above its next addend.

Convolutions and the fused attention are left to `HalfProducts`: their sums stay FP32.
"""

from typing import Any

import torch
from torch import Tensor

from benchmarks.half_products import HALF, HalfProducts, aten
from lightning_mpt.pieces import pieces

TERMS = 16
"""Products of one chunk: the depth of a tensor core's half instruction (mma.m16n8k16)."""


class HalfSums(HalfProducts):
    """Within it, matrix products of half tensors on the CPU are summed in half, `terms` products at a time."""

    def __init__(self, terms: int = TERMS) -> None:
        super().__init__()
        self.terms = terms

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Tensor) and args[0].dtype in HALF:
            if func in (aten.mm.default, aten.bmm.default):
                return self._product(*args)
            if func in (aten.addmm.default, aten.baddbmm.default):
                start, a, b = args
                beta, alpha = ((kwargs or {}).get(name, 1) for name in ("beta", "alpha"))
                return (beta * start.float() + alpha * self._product(a, b).float()).to(start.dtype)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        """`a @ b`: ... x rows x depth by ... x depth x columns, half; the result half."""
        wide_a, wide_b = a.float(), b.float()
        total = torch.zeros(*a.shape[:-1], b.shape[-1], dtype=a.dtype, device=a.device)
        for chunk in pieces(a.shape[-1], self.terms):
            part = (wide_a[..., chunk] @ wide_b[..., chunk, :]).to(a.dtype)
            total = (total.float() + part.float()).to(a.dtype)
        return total
