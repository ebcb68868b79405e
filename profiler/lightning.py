"""MemoryProfiler: the memory profiler as Lightning's `Profiler`, for `Trainer(profiler=...)`.

A step is recorded from the fetching of its batch, the first of those that accumulate for it, to the end of the
optimizer's step. Lightning tells a profiler when an action starts and stops, also when an exception passes through it:
that is how the recording is switched off then, since Lightning tears nothing down. Of what a profiler is not told, the
batch and that `fit` itself ends in an exception, it hears by a callback that is the Trainer's while `fit` runs.
"""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from .category import Category
from .collect.schedule import Schedule
from .collect.session import Session
from .collect.sources import MAX_EVENTS, Source
from .files import keep, made_path
from .ledger import BACKWARD, CLIP, FORWARD, OPTIMIZER_STEP
from .out_of_memory import explain, is_out_of_memory
from .ranks import worst
from .recorder import check_bounds, ended_by
from .report import MemoryReport
from .show.words import count_of

_FETCH = ".train_dataloader_next"
_BATCH = "run_training_batch"
_BACKWARD = ".backward"
_CLIP = ".configure_gradient_clipping"
_VALIDATION = ".on_validation_start"
_END = ".on_train_end"
_EPOCH = "run_training_epoch"


class MemoryProfiler(Profiler):
    """Records where memory goes in a few training steps, prints the table when `fit` ends, and keeps it as JSON.

    `Trainer(profiler=MemoryProfiler())`; afterwards `trainer.profiler.report` is a `MemoryReport`. The loggers get
    `mpt/peak_bytes` and, for every category, `mpt/peak_CATEGORY_bytes`. Of several processes each keeps its own report,
    and the first prints the one with the highest peak.

    A step is what the Trainer does until an optimizer has stepped: all batches that accumulate for it
    (`accumulate_grad_batches`), however many. Under manual optimization every batch is a step.

    Args:
        dirpath: folder for the report; by default the logger's, else the Trainer's `default_root_dir`.
        filename: its name, with or without `.json`; by default `memory_report`. Processes of a rank above 0 add
            `-RANK`.
        warmup_steps: steps to let pass first, so that optimizer state and library workspaces exist.
        steps: how many to record. Before and after them nothing is on, and nothing is slower.
        max_events: stop recording at the end of the step in which so many events and owners were noted; the report says
            so. On CPU, where the events are known only afterwards, the owners alone are counted: saved tensors,
            gradients, state, and runs of modules.
        save_trace: where to keep the recorded events as JSON, for `MemoryReport.from_trace`.
        save_snapshot: where to keep the CUDA allocator's own account of the recorded steps, with Python stacks, for
            https://pytorch.org/memory_viz. On CPU nothing is written, and a note says so.
            Processes of a rank above 0 add `-RANK` to the names of both.

    Where fit ends in an exception, Ctrl-C included, the steps recorded by then are printed and written all the same.
    Where it runs out of memory, what was live then is printed, kept as `out_of_memory_report`, and written beside the
    report, before the exception goes on.

    Raises:
        ValueError: for counts out of range, and at the first recorded step for a device that tells nothing of its
            allocations.
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        filename: str | None = None,
        *,
        warmup_steps: int = 2,
        steps: int = 3,
        max_events: int = MAX_EVENTS,
        save_trace: str | Path | None = None,
        save_snapshot: str | Path | None = None,
    ) -> None:
        super().__init__(dirpath=dirpath, filename=filename)  # before anything can fail: __del__ needs it
        check_bounds(warmup_steps, steps, max_events)
        self.warmup_steps = warmup_steps
        self.steps = steps
        self.max_events = max_events
        self.save_trace = save_trace
        self.save_snapshot = save_snapshot
        self._lightning_module: pl.LightningModule | None = None  # the Trainer sets it
        self._schedule: Schedule | None = None  # during fit, until the report is there
        self._stepped = 0  # the Trainer's optimizer steps before this batch
        self._report: MemoryReport | None = None
        self._source: Source | None = None  # the device's own
        self._log_dir: str | None = None  # the Trainer's, in this fit
        self._callback = _Listener(self)
        self._joined: list[pl.Callback] = []  # the Trainer's callbacks, while ours is among them
        self.out_of_memory_report: MemoryReport | None = None
        """What was live when memory ran out, if it did in the last fit."""
        self._printed = True
        self._why_none = "fit has not run with this profiler"
        self._handled: BaseException | None = None
        self._ran_out = False

    @property
    def report(self) -> MemoryReport:
        """The report of the last fit. Raises RuntimeError, with the reason, where there is none."""
        if self._report is None:
            raise RuntimeError(f"There is no memory report: {self._why_none}.")
        return self._report

    # -- what Lightning calls -----------------------------------------------------------------------------------

    @override
    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        # Without the folder: Lightning would take it for the user's, and a later Trainer's files would go there.
        super().setup(stage, local_rank)
        self._log_dir = log_dir
        if stage == "fit":
            self._abort()
            self._report, self.out_of_memory_report, self._printed = None, None, False
            self._schedule = Schedule(self._make_session, self.warmup_steps, self.steps)
            self._join()
            self._handled, self._ran_out = sys.exc_info()[1], False
            self._why_none = (
                f"fit ended after too few steps: it needs warmup_steps={self.warmup_steps} and at least one more"
            )

    @override
    def start(self, action_name: str) -> None:
        if self._schedule is None:
            return
        if action_name.endswith(_FETCH):
            self._fetch()
        elif action_name == _BATCH:
            self._stepped = self._trainer().global_step
        elif self._schedule.session is None:
            return
        elif action_name.endswith(_BACKWARD) and action_name.startswith("[Strategy]"):
            self._schedule.session.begin_phase(BACKWARD)
        elif action_name.endswith(_CLIP) and self._clips():
            self._schedule.session.begin_phase(CLIP)
        elif action_name.endswith(_VALIDATION):
            # A validation epoch can be long, and every event of it would be kept. What was counted is enough; where
            # nothing has, the next training step begins anew.
            counted = self._schedule.session.counted_steps
            if counted:
                self._finish(f"Validation ended the recording after {counted} of {count_of(self.steps, 'step')}.")
            else:
                self._schedule.abort()
        elif action_name.endswith(_END):
            self._finish()  # now, while there are loggers: they are done before `describe` is called

    @override
    def stop(self, action_name: str) -> None:
        # Called in a `finally`: an exception is passing if one is being handled that was not when fit began. That the
        # data are at their end is none.
        error = sys.exc_info()[1]
        if error is not None and error is not self._handled and not isinstance(error, StopIteration):
            self._fail(error)
            if action_name == _EPOCH:  # in a process that Lightning spawned no callback is told of exceptions
                self._tell_before_the_end()
        elif self._schedule is None:
            return
        elif action_name == _BATCH:
            if self._ends_step() and self._schedule.end():
                self._finish()
        elif action_name.endswith(_CLIP) and self._schedule.session is not None and self._clips():
            self._schedule.session.begin_phase(OPTIMIZER_STEP)

    @override
    def summary(self) -> str:
        if self._report is None:
            return ""
        from .show.render import report_text

        return report_text(self._report)

    @override
    def describe(self) -> None:
        """Called by the Trainer when `fit` (or another stage) ends: print the table and write the report, once."""
        self._leave()
        if not self._printed and self._stage == "fit":
            self._printed = True
            self._finish()
            if self._report is None:
                rank_zero_warn(f"There is no memory report: {self._why_none}.")
            rank, report = worst(self._report)  # first: the other processes wait for it
            if report is not None and self._trainer().is_global_zero:
                if self._trainer().world_size > 1:
                    print(f"Of {self._trainer().world_size} processes, that of rank {rank} has the highest peak:")
                report.print()
            if self._report is not None:
                keep("The memory report", self._report.save, self._report_path())
        self.teardown(self._stage)

    @override
    def teardown(self, stage: str | None) -> None:
        # Also called by __del__ of an object that __init__ refused.
        if getattr(self, "_schedule", None) is not None:
            self._abort()
        super().teardown(stage)

    # -- recording ----------------------------------------------------------------------------------------------

    def _make_session(self, find_duplicates: bool = False) -> Session:
        trainer = self._trainer()
        return Session(
            trainer.lightning_module,
            trainer.optimizers,
            witnesses=[trainer.precision_plugin, _Copies(trainer)],
            device=trainer.strategy.root_device,
            max_events=self.max_events,
            find_duplicates=find_duplicates,
            source=self._source,
            wrapper=trainer.model,
            save_snapshot=None if self.save_snapshot is None else self._of_rank(self.save_snapshot),
        )

    def _trainer(self) -> pl.Trainer:
        assert self._lightning_module is not None
        return self._lightning_module.trainer

    def _join(self) -> None:
        self._leave()
        self._joined = self._trainer().callbacks  # type: ignore[attr-defined]  # set by its callback connector
        self._joined.append(self._callback)

    def _leave(self) -> None:
        joined, self._joined = self._joined, []
        if self._callback in joined:
            joined.remove(self._callback)

    def _fetch(self) -> None:
        """A batch is fetched: a step begins, or goes on with it."""
        assert self._schedule is not None
        self._schedule.begin()
        if self._schedule.session is not None:
            self._schedule.session.begin_phase(FORWARD)

    def _ends_step(self) -> bool:
        """Whether the batch that is over was the last of its step: not where gradients accumulate still."""
        trainer = self._trainer()
        return not trainer.lightning_module.automatic_optimization or trainer.global_step > self._stepped

    def _clips(self) -> bool:
        """Whether something is clipped: Lightning asks for it in every step."""
        trainer = self._trainer()
        return bool(trainer.gradient_clip_val) or is_overridden("configure_gradient_clipping", trainer.lightning_module)

    def _finish(self, *notes: str) -> None:
        """Stop recording and make the report of the steps counted so far, if there are any."""
        schedule, self._schedule = self._schedule, None
        if schedule is None:
            return
        recording = schedule.finish(*notes)
        if recording is None:
            self._why_none = schedule.why_lost or self._why_none
            return
        self._report = MemoryReport.from_recording(recording)
        self._log(self._report)
        if self.save_trace is not None:
            keep("The trace", recording.save, self._of_rank(self.save_trace))

    def _log(self, report: MemoryReport) -> None:
        """The peak and what it is made of, to the Trainer's loggers."""
        trainer = self._trainer()
        if not trainer.is_global_zero:
            return
        metrics = {f"mpt/peak_{category}_bytes": float(size) for category, size in report.categories.items()}
        metrics["mpt/peak_bytes"] = float(report.peak_bytes)
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)

    def _fail(self, error: BaseException) -> None:
        """An exception passes through: show what was live if memory ran out, and let it go on."""
        session = self._schedule.session if self._schedule is not None else None
        counted = self._schedule.counted if self._schedule is not None else 0
        if is_out_of_memory(error) and not self._ran_out and self._stage == "fit":
            self._ran_out = True  # the exception passes through further actions
            self.out_of_memory_report = report = explain(error, lambda: session or self._make_session())
            if report is not None:
                with suppress(OSError):  # nothing may get in the way of the exception, not even a warning
                    report.save(made_path(self._report_path("_out_of_memory")))
        elif counted:
            with suppress(Exception):
                self._finish(ended_by(error, counted))
        if session is not None:
            self._abort()
            self._why_none = f"a training step ended in {type(error)!r}, and the recording with it"
            if self.out_of_memory_report is not None:
                self._why_none += "; what was live then is in `out_of_memory_report`"

    def _tell_before_the_end(self) -> None:
        """fit ends in an exception: print and write what was recorded before, alone, as other processes may be gone."""
        if self._report is None or self._printed:
            return
        self._printed = True
        if self._trainer().is_global_zero and not self._ran_out:  # the table of that moment was printed
            self._report.print()
        with suppress(OSError):
            self._report.save(made_path(self._report_path()))

    def _end_in(self, error: BaseException) -> None:
        """fit ends in `error`, wherever it came from: it need not have passed through an action."""
        self._fail(error)
        self._tell_before_the_end()
        self._leave()

    def _abort(self) -> None:
        schedule, self._schedule = self._schedule, None
        if schedule is not None:
            schedule.abort()

    def _report_path(self, kind: str = "") -> Path:
        folder = self.dirpath or self._log_dir or self._trainer().default_root_dir
        name = (self.filename or "memory_report").removesuffix(".json")
        return self._of_rank(Path(folder) / f"{name}{kind}.json")

    def _of_rank(self, path: str | Path) -> Path:
        """Each process's own."""
        rank, path = self._trainer().global_rank, Path(path)
        return path.with_name(f"{path.stem}-{rank}{path.suffix}") if rank else path


class _Listener(pl.Callback):
    """Tells the profiler what the batch is, and of the exception that ends fit: a profiler is told of actions only."""

    def __init__(self, profiler: MemoryProfiler) -> None:
        self._profiler = profiler

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *_: Any) -> None:
        schedule = self._profiler._schedule
        if schedule is not None and schedule.session is not None:
            schedule.session.claim_inputs(batch)

    @override
    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._profiler._end_in(exception)


class _Copies:
    """Knows the modules that callbacks keep beside the one that is trained: an average of its weights, say."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self._callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]

    def memory_categories(self) -> Iterator[tuple[Category, torch.Tensor, None]]:
        for callback in self._callbacks:
            for module in vars(callback).values():
                if isinstance(module, torch.nn.Module):  # what is also the trained one's stays its weights
                    for tensor in (*module.parameters(), *module.buffers()):
                        yield Category.BUFFERS, tensor, None
