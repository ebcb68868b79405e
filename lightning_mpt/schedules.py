"""Learning-rate schedules that do not advance on a skipped step.

The Trainer advances a schedule after every batch, skipped or not. So the schedule itself holds back one call for every
step that it is told was skipped. Its object stays the one that the user made: its class changes, until `release`.
"""

from collections.abc import Sequence
from typing import Any


class HeldSchedules:
    """Holds schedules back by as many calls as there were skipped steps."""

    def __init__(self) -> None:
        self._held: dict[Any, int] = {}
        """The schedules, with their places in what is owed."""
        self._owed: list[int] = []

    def hold(self, scheduler: Any, frequency: int) -> None:
        """From now on `scheduler` owes a call for every `frequency` steps that were skipped."""
        if scheduler in self._held:
            return
        if not self._held:
            self._owed = []  # in place of those that were released
        original, owed, held = type(scheduler), self._owed, self._held
        held[scheduler] = len(owed)
        owed.append(0)

        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            place = held.get(scheduler)  # a copy of a schedule has none
            if place is not None and owed[place] >= frequency:
                owed[place] -= frequency
                return None
            return original.step(scheduler, *args, **kwargs)

        scheduler.__class__ = type(original.__name__, (original,), {"step": step})

    def skipped(self, optimizer: Any) -> None:
        """A step of `optimizer` was skipped."""
        for scheduler, place in list(self._held.items()):
            theirs = scheduler.optimizer  # perhaps in Fabric's wrapper
            if getattr(theirs, "optimizer", theirs) is optimizer:
                self._owed[place] += 1

    def release(self) -> None:
        """Give every schedule its own class again."""
        for scheduler in list(self._held):
            scheduler.__class__ = type(scheduler).__base__
        self._held.clear()

    def state_dict(self) -> list[int]:
        """How many steps' calls each schedule owes, in the order in which they were held; also after `release`."""
        return list(self._owed)

    def load_state_dict(self, owed: Sequence[int]) -> None:
        """Owe what was owed. Of other schedules than these nothing is taken over."""
        if len(owed) == len(self._owed):
            self._owed[:] = owed
