"""Parameters that step together, with all that their update needs, and a quick answer to whether that still holds.

In most steps nothing has changed but the gradients. To find that out, one thing is asked of all parameters at a time:
with a thousand of them, a few Python lines for each would take longer than the update takes a GPU.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor

from .kernels.slots import Slot, Slots
from .masters import MasterWeights
from .shards import any_sharded, local
from .state import MOMENTS
from .storage import HALF_DTYPES


class Ready:
    """The slots of some parameters, as they are now.

    Args:
        parameters: of one group, on one device.
        slot_of: makes a parameter's slot, and its state where there is none yet.
        states: the optimizer's state.
        masters: of the half parameters.
        amsgrad: whether the group's state has a third moment.

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
        *,
        amsgrad: bool,
    ) -> None:
        self.slots = Slots(map(slot_of, parameters))
        self.steps = [slot.step for slot in self.slots]
        self.half = [parameter for parameter in parameters if parameter.dtype in HALF_DTYPES]
        self.sharded = any_sharded(parameters)
        self._parameters, self._masters, self._replaced = parameters, masters, masters.replaced
        self._entries = [states[parameter] for parameter in parameters]
        self._state_of: Callable[[dict[str, Any]], tuple[Any, ...]] = itemgetter(
            "step", *(MOMENTS if amsgrad else MOMENTS[:2])
        )
        self._state = list(chain.from_iterable(map(self._state_of, self._entries)))
        self._lie = self._where_they_lie()

    def __len__(self) -> int:
        return len(self._parameters)

    def holds(self, states: Mapping[Tensor, dict[str, Any]]) -> bool:
        """Whether the slots are still what they would be if they were made now."""
        return (
            self._masters.replaced == self._replaced
            and self._masters.untouched(self.half)
            and self._where_they_lie() == self._lie
            and all(map(is_, map(states.get, self._parameters), self._entries))
            and self._state_is_the_same()
        )

    def _where_they_lie(self) -> tuple[list[int], list[tuple[int, ...]]]:
        held = list(map(local, self._parameters)) if self.sharded else self._parameters
        return list(map(Tensor.data_ptr, held)), list(map(Tensor.stride, held))

    def _state_is_the_same(self) -> bool:
        try:
            return all(map(is_, chain.from_iterable(map(self._state_of, self._entries)), self._state))
        except KeyError:  # something was taken out
            return False
