"""Cross entropy of half logits: one read of them for the losses, one read and one write for their gradient."""

import torch
from torch import Tensor

from .launch import TYPES
from .row_losses import gradient_kernel, row_losses_kernel

BLOCK = 4096
OPTIONS = {"num_warps": 8}


class TritonCrossEntropy:
    """The losses and their gradient in one launch each. See `kernels/cross_entropy.py` for what is what."""

    def row_losses(self, logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """As `row_losses` of the reference."""
        rows, classes = logits.shape
        known = ((target >= 0) & (target < classes)) | (target == ignore_index)
        # Not waited for: on CUDA it is the device that stops, as it does for F.cross_entropy.
        torch._assert_async(known.all(), f"A target is no class: give int64 from 0 to {classes - 1}, or ignore_index.")
        logits, target = _rows_of(logits), target.contiguous()
        losses, log_sums = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
        with torch.cuda.device_of(logits):
            row_losses_kernel[(rows,)](
                logits, target, losses, log_sums, classes, logits.stride(0), ignore_index,
                DTYPE=TYPES[logits.dtype], BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
        return losses, log_sums

    def gradient(self, logits: Tensor, target: Tensor, log_sums: Tensor, gradient: Tensor, ignore_index: int) -> Tensor:
        """As `gradient` of the reference."""
        rows, classes = logits.shape
        logits, target, gradient = _rows_of(logits), target.contiguous(), gradient.contiguous()
        result = torch.empty(rows, classes, dtype=logits.dtype, device=logits.device)
        with torch.cuda.device_of(logits):
            # A row may begin within a block.
            gradient_kernel[(rows, -(-classes // BLOCK) + 1)](
                logits, target, log_sums, gradient, result, classes, logits.stride(0), ignore_index,
                DTYPE=TYPES[logits.dtype], BLOCK=BLOCK, **OPTIONS,
            )  # fmt: skip
        return result


def _rows_of(logits: Tensor) -> Tensor:
    """Logits whose rows are each in one piece, wherever they lie: these, or a copy."""
    return logits if logits.stride(1) == 1 or logits.shape[1] == 1 else logits.contiguous()
