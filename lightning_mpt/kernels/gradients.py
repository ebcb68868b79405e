"""Gradients in plain torch: one look at all of them before the update, and what the update makes of them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..pieces import dense, flat, piece_length, pieces
from .slots import GradientTransform


def true_gradient(gradient: Tensor, transform: GradientTransform, out: Tensor) -> Tensor:
    """The gradient (any shape, floating) unscaled and clipped in FP32: in `out`, or itself if nothing is to do."""
    scales = isinstance(transform.multiplier, Tensor) or transform.multiplier != 1.0
    if gradient.dtype == torch.float32 and not scales and transform.clip_value is None:
        return gradient
    out.copy_(gradient)
    if scales:
        out.mul_(transform.multiplier)
    if transform.clip_value is not None:
        out.clamp_(-transform.clip_value, transform.clip_value)
    return out


def scan_gradients(gradients: Sequence[Tensor], *, norm: bool) -> tuple[Tensor, Tensor | None]:
    """One look at all gradients before the update.

    Args:
        gradients: floating tensors on one device, at least one.
        norm: whether the norm is wanted.

    Returns:
        `found_inf`, float32 without dimensions: 1 if an element is inf or NaN, else 0. And the Euclidean norm over all
        elements as they are (still scaled), float32 without dimensions, or None. On their device, not waited for.
    """
    device = gradients[0].device
    if device.type == "cpu":
        squares = sum_of_squares(gradients)
        # The sum overflows long after a norm clipped to anything would be lost; only then look twice.
        finite = torch.isfinite(squares) or all(_all_finite(gradient) for gradient in gradients)
        found_inf = torch.tensor(0.0 if finite else 1.0, dtype=torch.float32)
        return found_inf, squares.sqrt() if norm else None
    largest = torch.stack([torch.linalg.vector_norm(g, torch.inf, dtype=torch.float32) for g in gradients if g.numel()])
    found_inf = largest.isfinite().all().logical_not().float()
    if not norm:
        return found_inf, None
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in gradients]
    return found_inf, torch.linalg.vector_norm(torch.stack(norms))


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of all squares in FP32 (float32, no dimensions); by pieces, since CPU reductions copy whole tensors."""
    length = piece_length(tensors)
    scratch = torch.empty(length, dtype=torch.float32)
    sums = [torch.zeros((), dtype=torch.float32)]
    for stretch in _stretches(tensors, length):
        fp32 = stretch[0]
        if len(stretch) > 1 or fp32.dtype != torch.float32:
            sizes = list(map(Tensor.numel, stretch))
            fp32 = scratch[: sum(sizes)]
            torch._foreach_copy_(list(fp32.split(sizes)), stretch)
        sums.append(torch.dot(fp32, fp32))
    return torch.stack(sums).sum()


def _stretches(tensors: Sequence[Tensor], length: int) -> Iterator[list[Tensor]]:
    """All elements, flat, in stretches of at most `length`: small tensors together, large ones in parts."""
    together: list[Tensor] = []
    room = length
    for tensor in tensors:
        values = flat(dense(tensor))
        for part in pieces(values.numel(), length):
            size = part.stop - part.start
            if size > room:
                yield together
                together, room = [], length
            together.append(values if size == values.numel() else values[part])
            room -= size
    if together:
        yield together


def _all_finite(tensor: Tensor) -> bool:
    values = flat(dense(tensor))
    return all(bool(values[part].isfinite().all()) for part in pieces(values.numel(), piece_length([tensor])))
