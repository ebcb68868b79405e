"""Learning-rate schedules that do not advance on a skipped step.

The Trainer advances a schedule after every batch, skipped or not. So the schedule itself holds back one call for every
step that it is told was skipped. Its object stays the one that the user made: its class changes, until `release`.
"""

from typing import Any


class HeldSchedules:
    """Holds schedules back by as many calls as there were skipped steps."""

    def __init__(self) -> None:
        self._owed: dict[Any, int] = {}

    def hold(self, scheduler: Any, frequency: int) -> None:
        """From now on `scheduler` owes a call for every `frequency` steps that were skipped."""
        original, owed = type(scheduler), self._owed
        owed[scheduler] = 0

        def step(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if owed.get(scheduler, 0) >= frequency:
                owed[scheduler] -= frequency
                return None
            return original.step(scheduler, *args, **kwargs)

        scheduler.__class__ = type(original.__name__, (original,), {"step": step})

    def skipped(self, optimizer: Any) -> None:
        """A step of `optimizer` was skipped."""
        for scheduler in list(self._owed):
            theirs = scheduler.optimizer  # perhaps in Fabric's wrapper
            if getattr(theirs, "optimizer", theirs) is optimizer:
                self._owed[scheduler] += 1

    def release(self) -> None:
        """Give every schedule its own class again."""
        for scheduler in list(self._owed):
            scheduler.__class__ = type(scheduler).__base__
        self._owed.clear()
