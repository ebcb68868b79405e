"""The update in plain torch: unscale, clip, AdamW and rounding, in FP32, piece by piece.

For every weight, with master `w` (FP32), gradient `g` as backward left it, loss scale `S` and clip coefficient `c`:

    g <- clamp(g / S * c, -clip_value, +clip_value)
    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g**2
    w <- w - lr (weight_decay w + (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps))
    weight <- half(w)

(Loshchilov and Hutter, arXiv 1711.05101, over the master weights of Micikevicius et al., arXiv 1710.03740. Adam, arXiv
1412.6980, adds weight_decay w to g instead.) The middle three lines are torch's own fused step. What is ours is around
it: the master is put together from its storage, the gradient is brought to FP32 *before* it is unscaled, since in fp16
it would underflow again, and the new master is taken apart. All of that happens on a piece small enough to stay in the
cache, so memory is read and written once, and no FP32 copy of a model, or of one embedding, ever exists. Parameters
smaller than a piece share one, since every call on a tensor has a price.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pieces import dense, flat, ordered_like, piece_length, pieces
from ..storage import MasterStorage


class Slot(NamedTuple):
    """One parameter and all that its update reads and writes.

    All but `step` have the parameter's shape. Master and moments are dense and run through memory as the weight does,
    or, if that is not dense, as its contiguous copy.
    """

    weight: Tensor
    """float16, bfloat16 or float32; written."""
    gradient: Tensor
    """Any floating dtype, still scaled; only read."""
    master: Tensor | None
    """As the storage keeps it; written. None where the weight is float32 and so its own master."""
    exp_avg: Tensor
    """float32; written."""
    exp_avg_sq: Tensor
    """float32; written."""
    max_exp_avg_sq: Tensor | None
    """float32; written. Of AMSGrad, else None."""
    step: Tensor
    """Number of steps, this one included: float32, no dimensions, on the weight's device; only read."""


class GradientTransform(NamedTuple):
    """What makes a true gradient of what backward left."""

    multiplier: Tensor | float = 1.0
    """The clip coefficient over the loss scale: a number, or float32 without dimensions on the gradients' device."""
    clip_value: float | None = None
    """Largest magnitude of an element of the true gradient."""

    @property
    def is_identity(self) -> bool:
        return isinstance(self.multiplier, float) and self.multiplier == 1.0 and self.clip_value is None


def adamw_(
    slots: Sequence[Slot],
    storage: MasterStorage,
    transform: GradientTransform,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    found_inf: Tensor | None = None,
) -> None:
    """Update every slot in place. All tensors are on one device.

    Args:
        slots: the parameters of one group; none has elements of a sparse layout.
        storage: how the masters of the half weights are stored.
        transform: applied to the gradients in FP32; the gradients themselves are not changed.
        lr: learning rate; a tensor (float32, one element) is read on its device.
        betas: decay rates of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: factor of the master that is taken off the master (`decoupled`) or added to the gradient.
        decoupled: AdamW rather than Adam with L2 regularization.
        maximize: ascend.
        found_inf: float32, one element. Where it is not zero nothing changes, bit for bit; it is read on the device.
    """
    if not slots:
        return
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    options: dict[str, Any] = {
        "lr": lr,
        "beta1": betas[0],
        "beta2": betas[1],
        "weight_decay": weight_decay,
        "eps": eps,
        "maximize": maximize,
        "found_inf": found_inf,
    }
    length = piece_length([slot.weight for slot in slots])
    scratch = torch.empty(2, length, dtype=torch.float32, device=slots[0].weight.device)
    for pack in _packs(slots, length):
        _update(pack, storage, transform, fused, options, scratch)


def _packs(slots: Sequence[Slot], length: int) -> Iterator[list[Slot]]:
    """The same update as packs of flat slots: slices of a large parameter one by one, many small parameters together.

    A pack has at most `length` elements, and its weights share a dtype, as do its gradients. It must be updated before
    the next is asked for.
    """
    open_packs: dict[tuple[torch.dtype, torch.dtype], list[Slot]] = {}
    room: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for slot in slots:
        weight = dense(slot.weight)
        numel = weight.numel()
        tensors = (weight, ordered_like(slot.gradient, weight), *slot[2:6])
        views = [None if tensor is None else flat(tensor) for tensor in tensors]
        if weight is not slot.weight or numel > length // 4:
            for part in pieces(numel, length):
                yield [Slot._make([*(None if view is None else view[part] for view in views), slot.step])]
            if weight is not slot.weight:
                slot.weight.copy_(weight)
        elif numel:
            key = (weight.dtype, slot.gradient.dtype)
            if room.get(key, 0) < numel:
                if key in open_packs:
                    yield open_packs[key]
                open_packs[key], room[key] = [], length // 2  # gathering them takes some room too
            open_packs[key].append(Slot._make([*views, slot.step]))
            room[key] -= numel
    yield from open_packs.values()


def _update(
    pack: list[Slot],
    storage: MasterStorage,
    transform: GradientTransform,
    fused: Callable[..., None],
    options: dict[str, Any],
    scratch: Tensor,
) -> None:
    """Update a pack in place: flat slots of at most `scratch.shape[1]` elements together."""
    sizes = [len(slot.weight) for slot in pack]
    out, spare = scratch[0, : sum(sizes)], scratch[1, : sum(sizes)]
    weights, gradients, stored, exp_avgs, exp_avg_sqs, maxima, steps = (
        list(column) for column in zip(*pack, strict=True)
    )
    maxima = [] if maxima[0] is None else maxima
    weight = _gathered(weights)
    if stored[0] is None:
        fp32 = weight
        masters = weights
    else:
        together = _gathered(stored)
        fp32 = storage.decode(weight, together, out, spare)
        masters = list(fp32.split(sizes))
    true = true_gradient(_gathered(gradients), transform, spare)
    fused(masters, list(true.split(sizes)), exp_avgs, exp_avg_sqs, maxima, steps, amsgrad=bool(maxima), **options)
    if stored[0] is not None:
        storage.encode(fp32, weight, together, spare)
        if len(pack) > 1:
            torch._foreach_copy_(weights, list(weight.split(sizes)))
            torch._foreach_copy_(stored, list(together.split(sizes)))


def _gathered(tensors: list[Tensor]) -> Tensor:
    """Flat tensors one after the other: the tensor itself if it is one, else a copy."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def true_gradient(gradient: Tensor, transform: GradientTransform, out: Tensor) -> Tensor:
    """The gradient (flat, any floating dtype) unscaled and clipped in FP32: in `out`, or itself if nothing is to do."""
    if gradient.dtype == torch.float32 and transform.is_identity:
        return gradient
    out.copy_(gradient)
    if not (isinstance(transform.multiplier, float) and transform.multiplier == 1.0):
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
        found_inf = torch.tensor(0.0 if finite else 1.0)
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
    parts = [torch.zeros(())]
    for tensor in tensors:
        values = flat(dense(tensor))
        for part in pieces(values.numel(), length):
            piece = values[part]
            piece = piece if piece.dtype == torch.float32 else scratch[: len(piece)].copy_(piece)
            parts.append(torch.dot(piece, piece))
    return torch.stack(parts).sum()


def _all_finite(tensor: Tensor) -> bool:
    values = flat(dense(tensor))
    return all(bool(values[part].isfinite().all()) for part in pieces(values.numel(), piece_length([tensor])))
