"""The update in plain torch: unscale, clip, AdamW and rounding, in FP32, piece by piece.

For every weight, with master `w` (FP32), gradient `g` as backward left it, loss scale `S` and clip coefficient `c`:

    g <- clamp(g / S * c, -clip_value, +clip_value)
    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g**2
    w <- w - lr (weight_decay w + (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps))
    weight <- half(w)

(Loshchilov and Hutter, arXiv 1711.05101, over the master weights of Micikevicius et al., arXiv 1710.03740. Adam, arXiv
1412.6980, adds weight_decay w to g instead.) The middle three lines are torch's own fused step. What is ours is around
it: master and moments are decoded from their storage, the gradient is brought to FP32 *before* it is unscaled, since in
fp16 it would underflow again, and what is new is encoded. All of that happens on a piece small enough to stay in the
cache, so memory is read and written once, and no FP32 copy of a model, or of one embedding, ever exists. Parameters
smaller than a piece share one, since every call on a tensor has a price.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..pieces import dense, flat, ordered_like, piece_length, pieces
from ..storage import MasterStorage, Moment, MomentStorage
from ..storage.dither import STREAM_STRIDE, offset, ramp, signed
from ..storage.moments import blocks
from .gradients import scan_gradients, true_gradient
from .slots import GradientTransform, Slot

__all__ = ["adamw_", "scan_gradients", "tables"]


def tables() -> tuple[Tensor, ...]:
    """What is kept from step to step: nothing."""
    return ()


def adamw_(
    slots: Sequence[Slot],
    gradients: Sequence[Tensor],
    storage: MasterStorage,
    moments: MomentStorage,
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
        slots: the parameters of one group.
        gradients: one for each, of any floating dtype, dense in layout, still scaled; only read.
        storage: how the masters of the half weights are stored.
        moments: how all moments are.
        transform: applied to the gradients in FP32.
        lr: learning rate; a tensor (float32, one element) is read on its device.
        betas: decay rates of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: factor of the master that is taken off the master (`decoupled`) or added to the gradient.
        decoupled: AdamW rather than Adam with L2 regularization.
        maximize: ascend.
        found_inf: float32, one element. Where it is not zero nothing changes, bit for bit.
    """
    if not slots:
        return
    lossy = not (storage.exact and moments.exact)
    if lossy and found_inf is not None:
        if bool(found_inf):  # waits for the device: the kernel for CUDA does not
            return
        found_inf = None
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
    moment_rows = 0 if moments.exact else 2 + (slots[0].max_exp_avg_sq is not None)
    rows = 2 + lossy + moment_rows + max(0, moments.scratch_rows - 2)
    length = piece_length([slot.weight for slot in slots], rows, moments.block)
    device = slots[0].weight.device
    scratch = torch.empty(rows, length, dtype=torch.float32, device=device)
    dither = ramp(length, device) if lossy else None
    for pack in _packs(slots, gradients, length, moments.block):
        _update(pack, storage, moments, transform, fused, options, scratch, dither)


class _Part(NamedTuple):
    """A stretch of a parameter's memory. All tensors are flat."""

    weight: Tensor
    gradient: Tensor
    master: Tensor | None
    moments: list[Moment]
    step: Tensor
    start: int
    """The index of its first element within the parameter: a whole number of blocks."""


def _packs(slots: Sequence[Slot], gradients: Sequence[Tensor], length: int, block: int) -> Iterator[list[_Part]]:
    """The same update as packs of parts: pieces of a large parameter one by one, many small parameters together.

    A pack has at most `length` elements, each part filled up to whole blocks, and its weights share a dtype, as do its
    gradients. It must be updated before the next is asked for.
    """
    open_packs: dict[tuple[torch.dtype, torch.dtype], list[_Part]] = {}
    room: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for slot, gradient in zip(slots, gradients, strict=True):
        weight = dense(slot.weight)
        gradient = ordered_like(gradient, weight)
        numel = weight.numel()
        if weight is not slot.weight or numel > length // 4:
            for piece in pieces(numel, length):
                yield [_part(slot, weight, gradient, piece, block)]
            if weight is not slot.weight:
                slot.weight.copy_(weight)
        elif numel:
            key = (weight.dtype, gradient.dtype)
            size = blocks(numel, block) * block
            if room.get(key, 0) < size:
                if key in open_packs:
                    yield open_packs[key]
                open_packs[key], room[key] = [], length // 2  # gathering them takes some room too
            open_packs[key].append(_part(slot, weight, gradient, slice(0, numel), block))
            room[key] -= size
    yield from open_packs.values()


def _part(slot: Slot, weight: Tensor, gradient: Tensor, piece: slice, block: int) -> _Part:
    def moment(stored: Moment) -> Moment:
        scales = stored.scales
        if scales is not None:
            scales = scales[piece.start // block : blocks(piece.stop, block)]
        return Moment(flat(stored.codes)[piece], scales)

    return _Part(
        flat(weight)[piece],
        flat(gradient)[piece],
        None if slot.master is None else flat(slot.master)[piece],
        [moment(stored) for stored in slot.moments],
        slot.step,
        piece.start,
    )


class _Layout:
    """How the parts of a pack lie one after the other, each filled up to whole blocks."""

    def __init__(self, sizes: list[int], block: int) -> None:
        self._sizes = sizes
        self._filled = [blocks(size, block) * block for size in sizes]
        self.length = sum(self._filled)

    def gathered(self, tensors: list[Tensor]) -> Tensor:
        """The flat tensors together: the one itself if it is alone and fills its blocks, else a copy, filled with 0."""
        if self._filled == self._sizes:
            return _joined(tensors)
        filled: list[Tensor] = []
        for tensor, size, room in zip(tensors, self._sizes, self._filled, strict=True):
            filled += [tensor, tensor.new_zeros(room - size)]
        return torch.cat(filled)

    def views(self, together: Tensor) -> list[Tensor]:
        """The parts of what lies together."""
        parts = together.split(self._filled)
        return [part[:size] for part, size in zip(parts, self._sizes, strict=True)]

    def scatter(self, together: Tensor, tensors: list[Tensor]) -> None:
        """Copy the parts back, if `gathered` made a copy."""
        if together is not tensors[0]:
            torch._foreach_copy_(tensors, self.views(together))


def _update(
    pack: list[_Part],
    storage: MasterStorage,
    moments: MomentStorage,
    transform: GradientTransform,
    fused: Callable[..., None],
    options: dict[str, Any],
    scratch: Tensor,
    ramp: Tensor | None,
) -> None:
    """Update a pack in place."""
    layout = _Layout([len(part.weight) for part in pack], moments.block)
    rows = list(scratch[:, : layout.length])
    thresholds = None if ramp is None else _thresholds(pack, layout, rows.pop(), ramp)
    decoded = [
        _DecodedMoment(moments, list(stored), layout, rows, signed=index == 0)
        for index, stored in enumerate(zip(*(part.moments for part in pack), strict=True))
    ]
    out, spare = rows[:2]

    weights = [part.weight for part in pack]
    weight = layout.gathered(weights)
    half = pack[0].master is not None
    if half:
        masters = [part.master for part in pack if part.master is not None]
        master = layout.gathered(masters)
        fp32 = storage.decode(weight, master, out, spare)
    else:
        fp32 = weight
    true = true_gradient(layout.gathered([part.gradient for part in pack]), transform, spare)
    values = [moment.values for moment in decoded]
    maxima = values[2] if len(values) == 3 else []
    steps = [part.step for part in pack]
    fused(layout.views(fp32), layout.views(true), values[0], values[1], maxima, steps, amsgrad=bool(maxima), **options)
    if half:
        storage.encode(fp32, weight, master, spare, thresholds)
        layout.scatter(master, masters)
    layout.scatter(weight, weights)
    for moment in decoded:
        moment.encode(rows, thresholds)


class _DecodedMoment:
    """A moment of all parts of a pack in FP32. Takes its row of scratch from the end of `rows`."""

    def __init__(
        self, storage: MomentStorage, stored: list[Moment], layout: _Layout, rows: list[Tensor], *, signed: bool
    ) -> None:
        self._storage, self._layout, self._stored, self._signed = storage, layout, stored, signed
        if storage.exact:
            self.values = [moment.codes for moment in stored]
            return
        self._together = Moment(layout.gathered([moment.codes for moment in stored]))
        if storage.block > 1:
            self._together = self._together._replace(scales=_joined(self._scales))
        self._fp32 = storage.decode(self._together, rows.pop(), signed=signed)
        self.values = layout.views(self._fp32)

    @property
    def _scales(self) -> list[Tensor]:
        return [moment.scales for moment in self._stored if moment.scales is not None]

    def encode(self, scratch: list[Tensor], thresholds: Tensor | None) -> None:
        """Store what the values have become. Moves on the thresholds."""
        if self._storage.exact:
            return
        if thresholds is not None:
            thresholds.add_(signed(STREAM_STRIDE))
        self._storage.encode(self._fp32, self._together, scratch, thresholds, signed=self._signed)
        self._layout.scatter(self._together.codes, [moment.codes for moment in self._stored])
        if self._together.scales is not None and len(self._stored) > 1:
            torch._foreach_copy_(self._scales, list(self._together.scales.split([len(one) for one in self._scales])))


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _thresholds(pack: list[_Part], layout: _Layout, row: Tensor, ramp: Tensor) -> Tensor:
    """The dither of every element, int32, in `row`."""
    bits = row.view(torch.int32)
    for part, view in zip(pack, layout.views(bits), strict=True):
        torch.add(ramp[: len(view)], offset(part.start, part.step), out=view)
    return bits
