"""MemoryRecorder: the profiler round any PyTorch loop."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from .collect.schedule import Schedule
from .collect.session import Session
from .collect.sources import MAX_EVENTS
from .files import keep
from .ledger import PHASES
from .out_of_memory import explain, is_out_of_memory
from .report import MemoryReport
from .show.words import count_of


class MemoryRecorder:
    """Records where memory goes in a training loop.

    ```python
    with MemoryRecorder(model, optimizer) as recorder:
        for inputs, targets in loader:
            loss = criterion(model(inputs), targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    recorder.report.print()
    ```

    Args:
        module: the module that is trained. Its device is the one recorded.
        optimizers: the optimizer, or several.
        warmup_steps: steps to let pass first. The last of them is followed, but not counted: so that what it leaves
            behind is known, and values saved in two precisions are found without disturbing a step that counts.
        steps: how many steps to count, then stop recording; None for all until the end of the `with` block.
        max_events: stop recording at the end of the step in which so many events and owners were noted; the report says
            so. On CPU, where the events are known only afterwards, the owners alone are counted: saved tensors,
            gradients, state, and runs of modules.
        witnesses: further objects that know whose tensors are whose: with a method `memory_categories()` that yields
            `(category, tensor, parameter or None)`. An optimizer that has this method is asked by itself.
        save_trace: where to keep the recorded events as JSON, for `MemoryReport.from_trace`.
        save_snapshot: where to keep the CUDA allocator's own account of the recorded steps, with Python stacks, for
            https://pytorch.org/memory_viz. On CPU nothing is written, and a note says so.

    Where the block ends in an exception, Ctrl-C included, the report is of the steps counted by then. Where the loop
    runs out of memory, what was live then is printed, and kept as `out_of_memory_report`, before the exception goes on.

    On CUDA the device's peak statistics are reset at the beginning of every recorded step.

    Raises:
        ValueError: for a device that tells nothing of its allocations; for counts out of range.
        RuntimeError: where `torch.profiler` is recording already (CPU).
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] = (),
        *,
        warmup_steps: int = 0,
        steps: int | None = None,
        max_events: int = MAX_EVENTS,
        witnesses: Iterable[Any] = (),
        save_trace: str | Path | None = None,
        save_snapshot: str | Path | None = None,
    ) -> None:
        check_bounds(warmup_steps, steps, max_events)
        self._module = module
        self._optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
        self._warmup_steps = warmup_steps
        self._steps = steps
        self._max_events = max_events
        self._witnesses = list(witnesses)
        self._save_trace = save_trace
        self._save_snapshot = save_snapshot
        self._schedule: Schedule | None = None  # within the `with` block, until the report is there
        self._passed = 0
        self._report: MemoryReport | None = None
        self._why_none: str | None = None  # there is no report, where that is not for want of steps
        self.out_of_memory_report: MemoryReport | None = None
        """What was live when memory ran out, if it did within the `with` block."""

    @property
    def report(self) -> MemoryReport:
        """The report, once the counted steps are over. Raises RuntimeError, with the reason, where there is none."""
        if self._report is None:
            raise RuntimeError(f"There is no memory report: {self._why_none or self._too_few_steps()}.")
        return self._report

    def _too_few_steps(self) -> str:
        return (
            f"{count_of(self._passed, 'step')} ended (MemoryRecorder.step() says when), and a report needs more than "
            f"warmup_steps={self._warmup_steps} and the end of the `with` block"
        )

    def __enter__(self) -> "MemoryRecorder":
        self._passed, self._report, self.out_of_memory_report, self._why_none = 0, None, None, None
        self._schedule = Schedule(self._make_session, self._warmup_steps, self._steps)
        self._schedule.begin()
        return self

    def step(self) -> None:
        """Say that a training step is over."""
        self._passed += 1
        if self._schedule is not None:
            if self._schedule.end():
                self._finish()
            else:
                self._schedule.begin()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
            return
        self._why_none = f"the `with` block ended in {kind!r}, and the recording with it"
        counted = self._schedule.counted if self._schedule is not None else 0
        if is_out_of_memory(error):
            session = self._schedule.session if self._schedule is not None else None
            self.out_of_memory_report = explain(error, lambda: session or self._make_session())
            if self.out_of_memory_report is not None:
                self._why_none += "; what was live then is in `out_of_memory_report`"
        elif counted:
            with suppress(Exception):  # nothing may get in the way of the exception
                self._finish(ended_by(error, counted))
        if self._schedule is not None:
            self._schedule.abort()
            self._schedule = None

    def claim_inputs(self, batch: Any) -> None:
        """Say what the batch of this step is. Needed only for tensors that are made after the module's first call."""
        if self._schedule is not None and self._schedule.session is not None:
            self._schedule.session.claim_inputs(batch)

    def phase(self, name: str) -> None:
        """Say that a phase begins now: `forward`, `backward`, `clip`, or `optimizer_step`.

        Needed for `clip` alone, before gradients are clipped: it ends where one of the optimizers steps. The others
        are seen.

        Raises:
            ValueError: for another name.
        """
        if name not in PHASES:
            raise ValueError(f"phase {name!r} is not one of {', '.join(PHASES)}: a step has these phases only.")
        if self._schedule is not None and self._schedule.session is not None:
            self._schedule.session.begin_phase(name)

    def _make_session(self, find_duplicates: bool = False) -> Session:
        return Session(
            self._module,
            self._optimizers,
            self._witnesses,
            max_events=self._max_events,
            find_duplicates=find_duplicates,
            save_snapshot=self._save_snapshot,
        )

    def _finish(self, *notes: str) -> None:
        schedule, self._schedule = self._schedule, None
        if schedule is None:
            return
        recording = schedule.finish(*notes)
        if recording is None:
            self._why_none = schedule.why_lost or self._why_none
            return
        self._report = MemoryReport.from_recording(recording)
        if self._save_trace is not None:
            keep("The trace", recording.save, self._save_trace)


def ended_by(error: BaseException, counted: int) -> str:
    """The note of a report whose recording ended in an exception."""
    return f"{type(error).__name__} ended the recording after {count_of(counted, 'step')}."


def check_bounds(warmup_steps: int, steps: int | None, max_events: int) -> None:
    """Raise ValueError unless the counts make sense."""
    if not isinstance(warmup_steps, int) or warmup_steps < 0:
        raise ValueError(
            f"warmup_steps={warmup_steps!r}: must be a whole number, 0 or more. The default is a good one."
        )
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps={steps!r}: must be a whole number, 1 or more: at least one step has to be recorded.")
    if not isinstance(max_events, int) or max_events < 1:
        raise ValueError(f"max_events={max_events!r}: must be a whole number, 1 or more. The default is a good one.")
