"""The FP32 master weights of a set of parameters, however each is stored.

One door: whoever reads a master or writes one does it here. A half weight that was written by anyone else (a loaded
file, an average, a manual re-initialization) makes its master stale. That shows in the tensor's version, which counts
in-place writes, and the master then starts again from the weight as it is. A write through `.data` is not counted: the
split master is then the new weight plus an old correction of at most half a unit in its last place, and a plain FP32
master overrules the write.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .pieces import dense, flat, ordered_like, piece_length, pieces
from .shards import local, sharded_like, written
from .storage import MasterStorage, round_to_half


class _Entry(NamedTuple):
    storage: MasterStorage
    stored: Tensor
    version: int


class MasterWeights:
    """The masters of half parameters. A float32 parameter is its own master and needs none.

    What stores a master is a plain tensor, of the shape of what this process holds of its parameter.
    """

    def __init__(self) -> None:
        self._entries: dict[Tensor, _Entry] = {}

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
        self._entries[parameter] = _Entry(storage, stored, parameter._version)

    @torch.no_grad()
    def claim(self, parameter: Tensor, storage: MasterStorage) -> Tensor:
        """The tensor that keeps the parameter's master in this storage, on the parameter's device; up to date.

        A parameter with no master yet, or a stale one, starts from its own half value.
        """
        entry = self._current(parameter)
        if entry is None:
            held = local(parameter).detach()
            stored = storage.of_half(held)
            self._entries[parameter] = _Entry(storage, stored, parameter._version)
            return stored
        if entry.storage.name != storage.name or entry.stored.device != parameter.device:
            self.write(parameter, self.read(parameter).to(parameter.device), storage)
            return self._entries[parameter].stored
        stored = ordered_like(entry.stored, dense(local(parameter).detach()))
        if stored is not entry.stored:  # the parameter's memory format was changed
            self._entries[parameter] = entry._replace(stored=stored)
        return stored

    def holds(self, parameter: Tensor, stored: Tensor) -> bool:
        """Whether `stored` is what keeps the parameter's master, up to date."""
        entry = self._entries.get(parameter)
        return entry is not None and entry.stored is stored and entry.version == parameter._version

    def stepped(self, parameter: Tensor) -> None:
        """The parameter as it is now is its master's rounding: their owner has updated both."""
        written(parameter)
        entry = self._entries[parameter]
        self._entries[parameter] = entry._replace(version=parameter._version)

    @torch.no_grad()
    def publish(self, parameter: Tensor) -> None:
        """Round a master that is stored in FP32, and was updated there, into the half weight."""
        held = local(parameter)
        weight = dense(held)
        _round(ordered_like(self._entries[parameter].stored, weight), weight)
        if weight is not held:
            held.copy_(weight)
        self.stepped(parameter)

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
        storage, stored, _ = entry
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

    def drop(self, parameter: Tensor) -> None:
        """Forget the parameter's master."""
        self._entries.pop(parameter, None)

    def __contains__(self, parameter: Tensor) -> bool:
        return parameter in self._entries

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every parameter with the tensor that stores its master."""
        return ((parameter, entry.stored) for parameter, entry in self._entries.items())

    def _current(self, parameter: Tensor) -> _Entry | None:
        entry = self._entries.get(parameter)
        if entry is None or entry.version == parameter._version:
            return entry
        if entry.storage.dtype == torch.float32:
            # Some writes change nothing: cuDNN's flattening of RNN weights, a broadcast of equal weights.
            half = torch.empty_like(entry.stored, dtype=parameter.dtype)
            _round(entry.stored, half)
            if torch.equal(half.to(parameter.device), local(parameter).detach()):
                self.stepped(parameter)
                return self._entries[parameter]
        del self._entries[parameter]
        return None

    def __getstate__(self) -> dict[str, Any]:
        current = [(parameter, self._current(parameter)) for parameter in list(self._entries)]
        return {"entries": [(parameter, entry[:2]) for parameter, entry in current if entry is not None]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copied or unpickled parameter counts its versions anew.
        self._entries = {
            parameter: _Entry(storage, stored, parameter._version) for parameter, (storage, stored) in state["entries"]
        }


def _round(value: Tensor, half: Tensor) -> None:
    """Round a dense float32 tensor into a dense half one of the same shape and strides."""
    length = piece_length([value])
    scratch = torch.empty(length, dtype=torch.float32, device=value.device)
    for part in pieces(value.numel(), length):
        piece = flat(value)[part]
        round_to_half(piece, flat(half)[part], scratch[: len(piece)])
