"""The FP32 master weights of a set of parameters, however each is stored.

One door: whoever reads a master or writes one does it here. A half weight that was written by anyone else (a loaded
file, an average, a clamp, a manual re-initialization) makes its master stale, and the master then starts again from the
weight as it is, element by element, so that a write that changes nothing costs nothing:

- A master that is stored in FP32 is stale where the weight is not its rounding. That is looked for whenever the master
  is read, and by a step where the tensor's version has changed.
- A split one has no weight of its own to compare with. That somebody wrote shows in the tensor's version, which counts
  in-place writes; the first time every element starts again, and from then on a copy of the weight (2 bytes a
  parameter, of those that somebody writes) tells which elements to take; in a resumed run, from its beginning. A write
  through `.data` is not counted: the master is then the new weight plus an old correction of at most half a unit in its
  last place.
"""

from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pieces import dense, flat, ordered_like, piece_length, pieces
from .shards import any_sharded, local, sharded_like, written
from .storage import MasterStorage, round_to_half

VERSION = attrgetter("_version")


class _Entry(NamedTuple):
    storage: MasterStorage
    stored: Tensor
    seen: Tensor | None = None
    """The half weight as it was when it was its master's rounding; None where nobody else has written to it yet."""


class MasterWeights:
    """The masters of half parameters. A float32 parameter is its own master and needs none.

    What stores a master is a plain tensor, of the shape of what this process holds of its parameter.
    """

    def __init__(self) -> None:
        self._entries: dict[Tensor, _Entry] = {}
        self._versions: dict[Tensor, int] = {}
        """Each parameter's version when it was its master's rounding."""
        self._shared: set[Tensor] = set()
        """The parameters that somebody else writes to as well."""
        self._watched: set[Tensor] = set()
        """Those that may be written to before the next step, as one is whose module is loaded too."""
        self.replaced = 0
        """How often a tensor that stores a master was put in the place of another, or was taken away."""

    @torch.no_grad()
    def write(self, parameter: Tensor, value: Tensor, storage: MasterStorage | None = None) -> None:
        """Make `value` (float32, the parameter's shape) the master: changes the half weight in place.

        It is stored in `storage`, by default as the master was before. `value` itself is kept where that is a plain
        copy: hand over what no one else writes to.
        """
        if storage is None:
            storage = self._entries[parameter].storage
        held = local(parameter)
        weight = dense(held)
        value = ordered_like(local(value), weight)
        if storage.dtype == torch.float32:
            stored = value
            # The value may lie on the host while the parameter is on the device: it is rounded where it lies.
            half = torch.empty_like(value, dtype=weight.dtype)
            _round(value, half)
            weight.copy_(half)
        else:
            value = value.to(weight.device)
            stored = torch.empty_like(weight, dtype=storage.dtype)
            length = piece_length([weight])
            master, scratch = torch.empty(2, length, dtype=torch.float32, device=weight.device)
            for part in pieces(weight.numel(), length):
                piece = master[: part.stop - part.start].copy_(flat(value)[part])
                storage.encode(piece, flat(weight)[part], flat(stored)[part], scratch[: len(piece)])
        if weight is not held:
            held.copy_(weight)
        written(parameter)
        self._enter(parameter, storage, stored)

    @torch.no_grad()
    def claim(self, parameter: Tensor, storage: MasterStorage) -> Tensor:
        """The tensor that keeps the parameter's master in this storage, on the parameter's device; up to date.

        A parameter with no master yet, or a stale one, starts from its own half value.
        """
        entry = self._current(parameter)
        if entry is None:
            held = local(parameter).detach()
            stored = ordered_like(storage.of_half(held), dense(held))
            self._enter(parameter, storage, stored)
            return stored
        if entry.storage.name != storage.name or entry.stored.device != parameter.device:
            self.write(parameter, self.read(parameter).to(parameter.device), storage)
            return self._entries[parameter].stored
        stored = ordered_like(entry.stored, dense(local(parameter).detach()))
        if stored is not entry.stored:  # the parameter's memory format was changed
            self._put(parameter, entry._replace(stored=stored))
        return stored

    def untouched(self, parameters: Sequence[Tensor]) -> bool:
        """Whether nobody else has written to any of these since it was its master's rounding."""
        return list(map(self._versions.get, parameters)) == list(map(VERSION, parameters))

    def stepped(self, parameters: Sequence[Tensor]) -> None:
        """The parameters as they are now are their masters' rounding: their owner has updated both."""
        if any_sharded(parameters):
            for parameter in parameters:
                written(parameter)
        self._versions.update(zip(parameters, map(VERSION, parameters), strict=True))
        for parameter in self._watched and self._watched.intersection(parameters):
            self._watched.discard(parameter)
            self._put(parameter, self._entries[parameter]._replace(seen=None))
        for parameter in self._shared and self._shared.intersection(parameters):
            seen = self._entries[parameter].seen
            if seen is not None:
                seen.copy_(local(parameter).detach())

    @torch.no_grad()
    def publish(self, parameter: Tensor, *, always: bool = True) -> None:
        """Round a master that is stored in FP32, and was updated there, into the half weight.

        Args:
            parameter: the half parameter.
            always: also where the weight is its rounding already. Else it is not written to then, so that autograd
                need not know; finding that out waits for the device.
        """
        held = local(parameter)
        weight = dense(held)
        half = weight if always else torch.empty_like(weight)
        _round(ordered_like(self._entries[parameter].stored, weight), half)
        if not always:
            if torch.equal(half, weight):
                return
            weight.copy_(half)
        if weight is not held:
            held.copy_(weight)
        self.stepped([parameter])

    @torch.no_grad()
    def read(self, parameter: Tensor) -> Tensor:
        """The master: float32, the parameter's shape.

        A new tensor where it is decoded, else the stored one (not to be written to), on the device that holds it; of a
        parameter that is float32, the parameter.
        """
        if parameter.dtype == torch.float32:
            return parameter.detach()
        entry = self._current(parameter)
        if entry is None:
            return parameter.detach().float()
        storage, stored = entry.storage, entry.stored
        if storage.dtype == torch.float32:
            return sharded_like(stored, parameter)
        # Teardown moves parameters to the host before it asks; the result is made where the parameter is.
        weight = dense(local(parameter).detach())
        stored = ordered_like(stored.to(parameter.device), weight)
        value = torch.empty_like(weight, dtype=torch.float32)
        length = piece_length([weight])
        scratch = torch.empty(length, dtype=torch.float32, device=weight.device)
        for part in pieces(weight.numel(), length):
            out = flat(value)[part]
            storage.decode(flat(weight)[part], flat(stored)[part], out, scratch[: len(out)])
        return sharded_like(value, parameter)

    def shared(self) -> set[Tensor]:
        """The parameters that somebody else writes to as well, as far as that has been seen."""
        for parameter in list(self._entries):
            self._current(parameter)
        return self._shared

    def expect_writes(self, parameter: Tensor, *, once: bool = False) -> None:
        """Somebody else is going to write to the parameter, which is now still its master's rounding.

        Args:
            parameter: the half parameter.
            once: before the next step, and not after it.
        """
        if parameter in self._shared:
            return
        (self._watched if once else self._shared).add(parameter)
        entry = self._entries.get(parameter)
        if entry is not None:
            self._enter(parameter, entry.storage, entry.stored)

    def drop(self, parameter: Tensor) -> None:
        """Forget the parameter's master."""
        self._entries.pop(parameter, None)
        self._versions.pop(parameter, None)
        self._shared.discard(parameter)
        self._watched.discard(parameter)
        self.replaced += 1

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._entries

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter with each tensor that is kept for its master."""
        for parameter, entry in self._entries.items():
            yield parameter, entry.stored
            if entry.seen is not None:
                yield parameter, entry.seen

    def _enter(self, parameter: Tensor, storage: MasterStorage, stored: Tensor) -> None:
        """Keep `stored` for a parameter that is its rounding."""
        compared = storage.dtype != torch.float32 and (parameter in self._shared or parameter in self._watched)
        seen = local(parameter).detach().clone() if compared else None
        self._put(parameter, _Entry(storage, stored, seen))
        self._versions[parameter] = parameter._version

    def _put(self, parameter: Tensor, entry: _Entry) -> None:
        self._entries[parameter] = entry
        self.replaced += 1

    def _current(self, parameter: Tensor) -> _Entry | None:
        """The entry, after what somebody else wrote to the weight was taken over; None where all of it was."""
        entry = self._entries.get(parameter)
        if entry is None:
            return None
        if entry.stored.is_inference() and not torch.is_inference_mode_enabled():  # loaded by `trainer.validate`
            seen = None if entry.seen is None else entry.seen.clone()
            entry = entry._replace(stored=entry.stored.clone(), seen=seen)
            self._put(parameter, entry)
        held = local(parameter).detach()
        if entry.storage.dtype == torch.float32:
            stored = ordered_like(entry.stored, dense(held))
            _take_over(dense(held), stored)
            if stored is not entry.stored:
                self._put(parameter, entry._replace(stored=stored))
            self._versions[parameter] = parameter._version
        elif self._versions[parameter] != parameter._version:
            if entry.seen is None:
                self._shared.add(parameter)
                del self._entries[parameter], self._versions[parameter]
                self.replaced += 1
                return None
            changed = held != entry.seen.to(held.device)
            stored = torch.where(changed, entry.storage.of_half(held), entry.stored.to(held.device))
            self._enter(parameter, entry.storage, stored)
        return self._entries[parameter]

    def __getstate__(self) -> dict[str, Any]:
        current = [(parameter, self._current(parameter)) for parameter in list(self._entries)]
        entries = [(parameter, (entry.storage, entry.stored)) for parameter, entry in current if entry is not None]
        return {"entries": entries, "shared": self._shared}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._entries, self._versions, self._shared, self._watched, self.replaced = {}, {}, state["shared"], set(), 0
        for parameter, (storage, stored) in state["entries"]:
            self._enter(parameter, storage, stored)  # a copied or unpickled parameter counts its versions anew


def _round(value: Tensor, half: Tensor) -> None:
    """Round a dense float32 tensor into a dense half one of the same shape and strides."""
    length = piece_length([value])
    scratch = torch.empty(length, dtype=torch.float32, device=value.device)
    for part in pieces(value.numel(), length):
        piece = flat(value)[part]
        round_to_half(piece, flat(half)[part], scratch[: len(piece)])


def _take_over(half: Tensor, master: Tensor) -> None:
    """Make a dense float32 master the value of its half weight, in place, wherever the weight is not its rounding."""
    length = piece_length([master])
    scratch = torch.empty(length, dtype=torch.float32, device=master.device)
    rounded = torch.empty(length, dtype=half.dtype, device=master.device)
    for part in pieces(master.numel(), length):
        piece = flat(master)[part]
        now, then = flat(half)[part].to(master.device), rounded[: len(piece)]
        round_to_half(piece, then, scratch[: len(piece)])
        torch.where(now == then, piece, now.float(), out=piece)
