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

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from ..pieces import dense, flat, ordered_like, piece_length
from ..storage import MasterStorage, Moment, MomentStorage
from ..storage.dither import STREAM_STRIDE, offset, ramp, signed
from .gradients import scan_gradients, true_gradient
from .packs import Layout, Pack, joined, packs
from .slots import GradientTransform, Slot, Slots


class ReferenceKernel:
    """The update in plain torch, for one optimizer's tensors on one device.

    Args:
        model_numel: how many parameters the optimizer has there. Its scratch is little beside these, also where groups
            or single parameters are updated one by one.
    """

    elements_worth_a_launch = 1

    def __init__(self, model_numel: int = 0) -> None:
        self._model_numel = model_numel
        self._packs: WeakKeyDictionary[Slots, dict[Hashable, list[Pack]]] = WeakKeyDictionary()
        """Kept from step to step, by the length of a piece and the gradients' dtypes."""

    def tables(self) -> Iterable[Tensor]:
        """What is kept on the device from step to step: nothing but views."""
        return ()

    def scan_gradients(self, gradients: Sequence[Tensor], *, norm: bool) -> tuple[Tensor, Tensor | None]:
        """One look at all gradients before the update: see `gradients.py`."""
        return scan_gradients(gradients, norm=norm)

    def scan_each(self, gradients: Sequence[Tensor]) -> Tensor:
        """The same, of each gradient: 1 where an element is inf or NaN, else 0. float32, one for each."""
        return torch.stack([self.scan_gradients([gradient], norm=False)[0] for gradient in gradients])

    def adamw_(
        self,
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
            slots: the parameters of one group. What is worked out for `Slots` is kept as long as they live.
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
        slots = Slots.of(slots)
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
        weights = [dense(slot.weight) for slot in slots]
        flat_gradients = [
            flat(ordered_like(gradient, weight)) for gradient, weight in zip(gradients, weights, strict=True)
        ]
        moment_rows = 0 if moments.exact else 2 + (slots[0].max_exp_avg_sq is not None)
        rows = 2 + lossy + moment_rows + max(0, moments.scratch_rows - 2)
        length = piece_length(weights, rows, moments.block, model_numel=self._model_numel)
        scratch = list(torch.empty(rows, length, dtype=torch.float32, device=weights[0].device))
        dither = ramp(length, weights[0].device) if lossy else None
        for pack in self._packs_of(slots, weights, flat_gradients, length, moments.block):
            _update(pack, pack.gradients(flat_gradients), storage, moments, transform, fused, options, scratch, dither)
        for slot, weight in zip(slots, weights, strict=True):
            if weight is not slot.weight:  # it is not dense, and was updated as a dense copy
                slot.weight.copy_(weight)

    def _packs_of(
        self, slots: Slots, weights: Sequence[Tensor], gradients: Sequence[Tensor], length: int, block: int
    ) -> list[Pack]:
        dtypes = [gradient.dtype for gradient in gradients]
        if any(weight is not slot.weight for slot, weight in zip(slots, weights, strict=True)):
            copies = [slot._replace(weight=weight) for slot, weight in zip(slots, weights, strict=True)]
            return packs(copies, dtypes, length, block)
        kept = self._packs.setdefault(slots, {})
        key = (length, *dtypes)
        if key not in kept:
            kept[key] = packs(slots, dtypes, length, block)
        return kept[key]


def _update(
    pack: Pack,
    gradients: list[Tensor],
    storage: MasterStorage,
    moments: MomentStorage,
    transform: GradientTransform,
    fused: Callable[..., None],
    options: dict[str, Any],
    scratch: list[Tensor],
    ramp: Tensor | None,
) -> None:
    """Update a pack in place."""
    layout = pack.layout
    rows = [row if row.numel() == layout.length else row[: layout.length] for row in scratch]
    thresholds = None if ramp is None else _thresholds(pack, rows.pop(), ramp)
    decoded = [
        _DecodedMoment(moments, list(stored), layout, rows, signed=index == 0)
        for index, stored in enumerate(zip(*pack.moments, strict=True))
    ]
    out, spare = rows[:2]

    weight = layout.gathered(pack.weights)
    if pack.masters:
        master = layout.gathered(pack.masters)
        fp32 = storage.decode(weight, master, out, spare)
    else:
        fp32 = weight
    true = layout.views(true_gradient(layout.gathered(gradients), transform, spare))
    values = [moment.values for moment in decoded]
    maxima = values[2] if len(values) == 3 else []
    fused(layout.views(fp32), true, values[0], values[1], maxima, pack.steps, amsgrad=bool(maxima), **options)
    if pack.masters:
        storage.encode(fp32, weight, master, spare, thresholds)
        layout.scatter(master, pack.masters)
    layout.scatter(weight, pack.weights)
    for moment in decoded:
        moment.encode(rows, thresholds)


class _DecodedMoment:
    """A moment of all parts of a pack in FP32. Takes its row of scratch from the end of `rows`."""

    def __init__(
        self, storage: MomentStorage, stored: list[Moment], layout: Layout, rows: list[Tensor], *, signed: bool
    ) -> None:
        self._storage, self._layout, self._stored, self._signed = storage, layout, stored, signed
        if storage.exact:
            self.values = [moment.codes for moment in stored]
            return
        self._together = Moment(layout.gathered([moment.codes for moment in stored]))
        if storage.block > 1:
            self._together = self._together._replace(scales=joined(self._scales))
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


def _thresholds(pack: Pack, row: Tensor, ramp: Tensor) -> Tensor:
    """The dither of every element, int32, in `row`."""
    bits = row.view(torch.int32)
    for start, step, view in zip(pack.starts, pack.steps, pack.layout.views(bits), strict=True):
        torch.add(ramp[: len(view)], offset(start, step), out=view)
    return bits
