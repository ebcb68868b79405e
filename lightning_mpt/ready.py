"""Parameters that step together, with all that their update needs, and a quick answer to whether that still holds.

In most steps nothing has changed but the gradients. To find that out, one thing is asked of all parameters at a time:
with a thousand of them, a few Python lines for each would take longer than the update takes a GPU.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import is_
from typing import Any

from torch import Tensor

from .kernels.slots import Slot, Slots
from .masters import MasterWeights
from .shards import any_sharded, local
from .storage import HALF_DTYPES


class Ready:
    """The slots of some parameters, as they are now.

    Args:
        parameters: of one group, on one device.
        slot_of: makes a parameter's slot, and its state where there is none yet.
        states: the optimizer's state.
        masters: of the half parameters.

    Attributes:
        slots: one for each parameter.
        steps: their counts of steps.
        half: the parameters that have masters.
        sharded: whether what this process holds of the parameters is a part of them.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        slot_of: Callable[[Tensor], Slot],
        states: Mapping[Tensor, dict[str, Any]],
        masters: MasterWeights,
    ) -> None:
        self.slots = Slots(map(slot_of, parameters))
        self.steps = [slot.step for slot in self.slots]
        self.half = [parameter for parameter in parameters if parameter.dtype in HALF_DTYPES]
        self.sharded = any_sharded(parameters)
        self._parameters, self._masters, self._replaced = parameters, masters, masters.replaced
        self._entries = [states[parameter] for parameter in parameters]
        self._state = self._everything_in(self._entries)
        self._stored = [tensor for slot in self.slots for tensor in _stored(slot)]
        self._lie = self._where_they_lie()

    def __len__(self) -> int:
        return len(self._parameters)

    def holds(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the slots are still what they would be if they were made now, and lie where they lay."""
        if self._masters.replaced != self._replaced or not self._masters.untouched(self.half):
            return False
        if not all(map(is_, map(states.get, self._parameters), self._entries)):
            return False
        state = self._everything_in(self._entries)
        same = len(state) == len(self._state) and all(map(is_, state, self._state))
        return same and self._where_they_lie() == self._lie

    def _where_they_lie(self) -> tuple[list[Any], ...]:
        held = list(map(local, self._parameters)) if self.sharded else self._parameters
        of_stored = list(map(Tensor.data_ptr, self._stored))
        return of_stored, *(list(map(ask, held)) for ask in (Tensor.data_ptr, Tensor.size, Tensor.stride))

    @staticmethod
    def _everything_in(entries: Sequence[dict[str, Any]]) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, entries)))


def _stored(slot: Slot) -> Iterator[Tensor]:
    """What is kept of a parameter beside its weight."""
    for tensor in (slot.step, slot.master, *chain.from_iterable(slot.moments)):
        if tensor is not None:
            yield tensor
