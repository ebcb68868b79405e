"""How parameters are cut and put together for an update that works on pieces.

A large parameter is worked on piece by piece, so that a piece stays in the cache; small ones together, since every call
on a tensor has a price. None of that changes from step to step, so it is worked out once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..pieces import flat
from ..storage import Moment
from ..storage.moments import blocks
from .slots import Slot

LARGEST_GATHERED = 2**15
"""Parameters of more elements are worth the calls that it takes to update them alone."""


class Layout:
    """How the parts of a pack lie one after the other, each filled up to whole blocks."""

    def __init__(self, sizes: list[int], block: int) -> None:
        self._sizes = sizes
        self._filled = [blocks(size, block) * block for size in sizes]
        self._whole = self._filled == sizes
        self._alone = self._whole and len(sizes) == 1
        self.length = sum(self._filled)

    def gathered(self, tensors: list[Tensor]) -> Tensor:
        """The flat tensors together: the one itself if it is alone and fills its blocks, else a copy, filled with 0."""
        if self._whole:
            return joined(tensors)
        filled: list[Tensor] = []
        for tensor, size, room in zip(tensors, self._sizes, self._filled, strict=True):
            filled += [tensor, tensor.new_zeros(room - size)]
        return torch.cat(filled)

    def views(self, together: Tensor) -> list[Tensor]:
        """The parts of what lies together."""
        if self._alone:
            return [together]
        parts = together.split(self._filled)
        return list(parts) if self._whole else [part[:size] for part, size in zip(parts, self._sizes, strict=True)]

    def scatter(self, together: Tensor, tensors: list[Tensor]) -> None:
        """Copy the parts back, if `gathered` made a copy."""
        if together is not tensors[0]:
            torch._foreach_copy_(tensors, self.views(together))


@dataclass(slots=True)
class Pack:
    """Stretches of parameters that are updated together. All tensors are flat.

    It has at most as many elements as `packs` was told, each stretch filled up to whole blocks, and its weights share
    a dtype, as do their gradients.
    """

    weights: list[Tensor] = field(default_factory=list)
    masters: list[Tensor] = field(default_factory=list)
    """Empty where the weights are float32."""
    moments: list[tuple[Moment, ...]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    owners: list[int] = field(default_factory=list)
    """Whose they are: indices of the slots."""
    starts: list[int] = field(default_factory=list)
    """The index of each stretch's first element within its parameter: a whole number of blocks."""
    layout: Layout = field(default_factory=lambda: Layout([], 1))

    def gradients(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The stretches' gradients, of the flat ones of all slots."""
        found = []
        for owner, start, weight in zip(self.owners, self.starts, self.weights, strict=True):
            gradient, size = gradients[owner], weight.numel()
            found.append(gradient if gradient.numel() == size else gradient[start : start + size])
        return found


def packs(slots: Sequence[Slot], gradient_dtypes: Sequence[torch.dtype], length: int, block: int) -> list[Pack]:
    """All that the slots hold, in packs of at most `length` elements.

    Args:
        slots: with dense weights, on one device.
        gradient_dtypes: one for each.
        length: a whole number of blocks.
        block: elements that share a scale.
    """
    made: list[Pack] = []
    open_packs: dict[tuple[torch.dtype, torch.dtype], Pack] = {}
    room: dict[tuple[torch.dtype, torch.dtype], int] = {}
    for index, (slot, gradient_dtype) in enumerate(zip(slots, gradient_dtypes, strict=True)):
        numel = slot.weight.numel()
        if numel > min(length // 4, LARGEST_GATHERED):
            for start in range(0, numel, length):
                made.append(Pack())
                _add(made[-1], slot, index, start, min(start + length, numel), block)
        elif numel:
            key = (slot.weight.dtype, gradient_dtype)
            size = blocks(numel, block) * block
            if room.get(key, 0) < size:
                open_packs[key], room[key] = Pack(), length // 2  # gathering them takes some room too
                made.append(open_packs[key])
            _add(open_packs[key], slot, index, 0, numel, block)
            room[key] -= size
    for pack in made:
        pack.layout = Layout([weight.numel() for weight in pack.weights], block)
    return made


def joined(tensors: list[Tensor]) -> Tensor:
    """The flat tensors together; a single one is itself."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _add(pack: Pack, slot: Slot, index: int, start: int, stop: int, block: int) -> None:
    """Put elements `start` to `stop` of a parameter into a pack."""
    pack.weights.append(flat(slot.weight)[start:stop])
    if slot.master is not None:
        pack.masters.append(flat(slot.master)[start:stop])
    scales = slice(start // block, blocks(stop, block))
    pack.moments.append(
        tuple(
            Moment(flat(stored.codes)[start:stop], None if stored.scales is None else stored.scales[scales])
            for stored in slot.moments
        )
    )
    pack.steps.append(slot.step)
    pack.owners.append(index)
    pack.starts.append(start)
