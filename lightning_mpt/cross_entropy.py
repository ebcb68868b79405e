"""Cross entropy of half logits in FP32, with nothing in FP32 that is as large as they are.

Over a vocabulary the logits are the largest activation of a network. `F.cross_entropy` in FP32 makes an FP32 copy of
them, keeps their log-softmax for backward, and gives back an FP32 gradient, which is then rounded to half since the
logits are: 10 to 14 bytes for each 2 of theirs. Here each row's log of the sum of exponentials is kept, and softmax is
computed again in backward, in FP32, straight into the half gradient: on CUDA by a kernel that reads the logits once
forward and once backward, elsewhere some rows at a time. The numbers are the same.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels import cross_entropy_kernel_for
from .shards import layout
from .upcast import INSTEAD, Upcast, half_values, large, original


def instead_of_torchs(
    input: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """What `F.cross_entropy` gives for these arguments of its own; None where they are not for what is here."""
    if torch.compiler.is_compiling() or not isinstance(input, Tensor):
        return None
    input = original(input)
    served = (
        isinstance(target, Tensor)
        and layout(input) is layout(target) is None
        and torch._C._functorch.maybe_current_level() is None  # vmap, and what is built on it
        and torch.autograd.forward_ad._current_level < 0
        and target.device == input.device
        and half_values(input) is not None
        and input.dim() == 2
        and input.requires_grad
        and large(input)
        and target.dtype == torch.int64
        and target.shape == input.shape[:1]
        and weight is size_average is reduce is None
        and reduction in ("mean", "sum", "none")
        and label_smoothing == 0
    )
    if not served:
        return None
    if isinstance(input, Upcast):
        input.taken_in_half()
    return cross_entropy(input, target, ignore_index, reduction)


INSTEAD[F.cross_entropy] = instead_of_torchs


def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int, reduction: str) -> Tensor:
    """As `F.cross_entropy(logits.float(), ...)`.

    Args:
        logits: rows x classes, float16 or bfloat16, or what stands for FP32 values of such (`Upcast`).
        target: a class for each row, int64.
        ignore_index: rows with this target count for nothing.
        reduction: `mean` over the rows that count, `sum` or `none`.

    Returns:
        float32: without dimensions, or one for each row. The gradient of the logits is half, or stands for it.
    """
    losses: Tensor = _RowLosses.apply(logits, target, ignore_index)
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (target != ignore_index).sum()


class _RowLosses(torch.autograd.Function):
    """The loss of each row, float32; 0 where it is ignored."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        half = half_values(logits)
        assert half is not None
        losses, log_sums = cross_entropy_kernel_for(logits.device).row_losses(half, target, ignore_index)
        ctx.save_for_backward(logits, target, log_sums)
        ctx.ignore_index = ignore_index
        return losses

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, target, log_sums = ctx.saved_tensors
        half = half_values(logits)
        many = torch._C._functorch.is_legacy_batchedtensor(gradient)  # is_grads_batched=True
        if half is None or many or torch.is_grad_enabled():  # create_graph=True: in operations that torch takes apart
            gradient = torch.where(target == ctx.ignore_index, 0.0, gradient)
            one_hot = F.one_hot(torch.where(target == ctx.ignore_index, 0, target), logits.shape[1])
            return ((logits.float().softmax(1) - one_hot) * gradient[:, None]).to(logits.dtype), None, None
        kernel = cross_entropy_kernel_for(logits.device)
        half = kernel.gradient(half, target, log_sums, gradient, ctx.ignore_index)
        return Upcast.of(half) if isinstance(logits, Upcast) else half, None, None
