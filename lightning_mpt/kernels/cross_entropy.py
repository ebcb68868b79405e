"""Cross entropy of half logits row by row in plain torch, some rows at a time: the readable truth of the kernel."""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..pieces import pieces

LOGITS_AT_ONCE = {"cpu": 2**17}
"""Elements brought to FP32 at once: on a CPU what stays in its caches, elsewhere `DEFAULT_AT_ONCE`."""
DEFAULT_AT_ONCE = 2**25


class CrossEntropyKernel(Protocol):
    """What computes row losses and their gradient on one device. `ReferenceCrossEntropy` says what is what."""

    def row_losses(self, logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]: ...

    def gradient(
        self, logits: Tensor, target: Tensor, log_sums: Tensor, gradient: Tensor, ignore_index: int
    ) -> Tensor: ...


class ReferenceCrossEntropy:
    """The losses and their gradient in plain torch."""

    def row_losses(self, logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
        """The loss of each row.

        Args:
            logits: rows x classes, float16 or bfloat16; at least one class.
            target: a class for each row, int64.
            ignore_index: rows with this target have a loss of 0.

        Returns:
            The losses, and each row's logarithm of the sum of exponentials, float32.

        Raises:
            IndexError: a target is no class. On CUDA the device raises, as it does for `F.cross_entropy`.
        """
        losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        log_sums = torch.empty_like(losses)
        for rows in _some_rows(logits):
            losses[rows], log_sums[rows] = _losses_of(logits[rows].float(), target[rows], ignore_index)
        return losses, log_sums

    def gradient(self, logits: Tensor, target: Tensor, log_sums: Tensor, gradient: Tensor, ignore_index: int) -> Tensor:
        """The logits' gradient, in their dtype, from that of the losses (float32)."""
        gradient = torch.where(target == ignore_index, 0.0, gradient)
        target = torch.where(target == ignore_index, 0, target)
        result = torch.empty_like(logits)
        for rows in _some_rows(logits):
            softmax = logits[rows].float().sub_(log_sums[rows, None]).exp_()
            result[rows] = softmax.mul_(gradient[rows, None]).scatter_add_(1, target[rows, None], -gradient[rows, None])
            del softmax  # before the next rows' is made
        return result


def _losses_of(fp32: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Each row's loss and its log of the sum of exponentials. `fp32` is written over: nothing as large is made."""
    # nll_loss picks the target's logit, and checks the target as F.cross_entropy does.
    picked = F.nll_loss(fp32, target, ignore_index=ignore_index, reduction="none")
    largest = fp32.amax(1)
    log_sums = fp32.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)
    return torch.where(target == ignore_index, picked, log_sums + picked), log_sums


def _some_rows(logits: Tensor) -> Iterator[slice]:
    at_once = LOGITS_AT_ONCE.get(logits.device.type, DEFAULT_AT_ONCE)
    return pieces(len(logits), max(1, at_once // logits.shape[1]))
