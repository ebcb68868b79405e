"""Which steps are followed, and which of these count: what both recorders do in every step."""

from collections.abc import Callable

from ..recording import Recording
from .session import Session
from .sources import RecordingLost


class Schedule:
    """Lets steps pass, follows the last of these, then counts.

    Where following is cheap and memory runs out early (CUDA), every step that passes is followed, each by itself, so
    that there is something to show if it fails.

    Args:
        make: a new session; told whether to look for duplicates.
        warmup_steps: steps to let pass.
        steps: how many to count; None for all.
    """

    def __init__(self, make: Callable[[bool], Session], warmup_steps: int, steps: int | None) -> None:
        self._make = make
        self._warmup_steps = warmup_steps
        self._steps = steps
        self.passed = 0
        self.session: Session | None = None
        self.why_lost: str | None = None
        """After `finish`: why there is no recording of steps that were counted, where there is none."""

    def begin(self) -> None:
        """A step begins."""
        if self.session is None:
            session = self._make(self._goes_on())
            if not (self._goes_on() or session.follows_warmup):
                return
            session.start()
            self.session = session
        self.session.open_step(counted=self.passed >= self._warmup_steps)

    def end(self) -> bool:
        """A step is over. Gives whether the recording is complete."""
        went_on = self._goes_on()
        self.passed += 1
        if self.session is None:
            return False
        self.session.close_step()
        if not went_on:
            self.abort()
            return False
        counted = self.session.counted_steps
        return counted > 0 and (counted == self._steps or self.session.full)

    @property
    def counted(self) -> int:
        """How many steps were counted so far."""
        return 0 if self.session is None else self.session.counted_steps

    def finish(self, *notes: str) -> Recording | None:
        """Switch off and give what was counted, with these notes; None where nothing was, or where it is lost."""
        if self.session is None or not self.session.counted_steps:
            self.abort()
            return None
        try:
            recording = self.session.finish()
        except RecordingLost as error:
            self.why_lost = str(error)
            return None
        finally:
            self.abort()
        recording.notes += notes
        return recording

    def abort(self) -> None:
        """Switch off and forget."""
        session, self.session = self.session, None
        if session is not None:
            session.abort()

    def _goes_on(self) -> bool:
        """Whether what is seen of this step is kept for those after it."""
        return self.passed >= self._warmup_steps - 1
