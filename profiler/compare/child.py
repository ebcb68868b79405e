"""One run of `compare`, in its own process: train a few steps, write the report, say how it ended."""

import json
import os
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as pl
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from typing_extensions import override

from ..category import Category
from ..codec import decode
from ..ledger import BACKWARD
from ..lightning import MemoryProfiler
from ..out_of_memory import is_out_of_memory
from ..report import MemoryReport
from .class_path import TargetError, one_line
from .run import FAILED, JOB, OK, OUT_OF_MEMORY, OUTCOME, PROGRESS, REPORT, Job

TrainerArguments = Callable[[str], dict[str, Any]]
"""From a precision's name, what the Trainer is given for it."""

_TIMING_S = 10.0
"""Once the steps that are only timed have taken so long, there are enough of them: of slow ones, one will do."""


def main(folder: Path, trainer_arguments: TrainerArguments) -> None:
    """`run`, in a process that is there for nothing else: it ends when its parent does."""
    _end_with_parent()
    run(folder, trainer_arguments)


def run(folder: Path, trainer_arguments: TrainerArguments) -> None:
    """Do the job in `folder` and leave its outcome there. Raises nothing that training raised."""
    job = decode(Job, json.loads((folder / JOB).read_text(encoding="utf-8")))
    outcome: dict[str, Any] = {"status": OK, "error": None, "bad_target": False, "step_seconds": None}
    try:
        with (folder / PROGRESS).open("ab", buffering=0) as progress:
            report, outcome["step_seconds"] = train(job, trainer_arguments, folder, progress)
        report.save(folder / REPORT)
    except (Exception, SystemExit) as error:  # sys.exit in the training is no outcome
        traceback.print_exc()
        ran_out = ran_out_of_memory(error)
        outcome["status"] = OUT_OF_MEMORY if ran_out else FAILED
        outcome["bad_target"] = isinstance(error, TargetError) and not ran_out
        outcome["error"] = str(error) if isinstance(error, TargetError) else one_line(error)
    partial = folder / (OUTCOME + ".partial")
    partial.write_text(json.dumps(outcome), encoding="utf-8")
    partial.replace(folder / OUTCOME)


def train(
    job: Job, trainer_arguments: TrainerArguments, folder: Path, progress: BinaryIO
) -> tuple[MemoryReport, float | None]:
    """Train as `job` says: the report, and the median seconds of a step that was not recorded (None: there was none).

    Raises:
        TargetError: the target cannot be built, or its data has too few batches.
        ValueError: no optimizer stepped, or there was nothing to step for.
        Exception: whatever training raises.
    """
    pl.seed_everything(job.seed, workers=True, verbose=False)
    model, data = job.target.build()
    settings = job.target.trainer_settings()
    a_step = settings.get("accumulate_grad_batches", 1)
    profiler = MemoryProfiler(folder, "profile", warmup_steps=job.warmup_steps, steps=job.steps)
    needed = (job.warmup_steps + job.steps) * a_step
    watch = _Watch(needed, until=needed + job.steps * a_step, progress=progress)
    trainer = pl.Trainer(
        accelerator=job.accelerator,
        devices=1,
        max_epochs=1,
        limit_train_batches=watch.until,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        profiler=profiler,
        callbacks=[watch],
        **settings,
        **trainer_arguments(job.precision),
    )
    try:
        trainer.fit(model, data)
    except _Enough:
        pass
    except Exception as error:
        # What fails once the figures are there (the end of an epoch that had no validation) takes nothing from them.
        if watch.done < watch.needed:
            if watch.ran_out_of_data(trainer):
                raise _too_few(watch.done, job, a_step) from error
            raise
        traceback.print_exc()
    if watch.done < watch.needed:
        raise _too_few(watch.done, job, a_step)
    report = profiler.report
    if trainer.global_step == 0 or BACKWARD not in report.phases:
        what = "no optimizer stepped" if trainer.global_step == 0 else "nothing ran backward"
        raise ValueError(f"{what} in {watch.done} batches, so that this is no training: ask for more by --steps")
    seconds = statistics.median(watch.seconds) * a_step if watch.seconds else None
    return _with_notes(report), seconds


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, here or in what led to this error."""
    seen: BaseException | None = error
    while seen is not None:
        if is_out_of_memory(seen):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


class _Enough(Exception):
    """Every batch that is wanted has been: the end of the epoch, with its schedules and checkpoints, is not."""


class _Watch(pl.Callback):
    """Counts batches, tells the parent, times those after the recorded ones, and ends training when there are enough.

    The profiler has closed its step by the time that a batch ends for a callback.
    """

    def __init__(self, needed: int, until: int, progress: BinaryIO) -> None:
        self.needed = needed
        self.until = until
        self.done = 0
        self.seconds: list[float] = []
        self._progress = progress
        self._began = 0.0

    @override
    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # A module that writes to its logger finds one. Not earlier: with a logger, the Trainer refuses a model and
        # data that were given different values under one name.
        trainer.loggers = [DummyLogger()]

    @override
    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.done >= self.needed:
            self._began = _now(trainer)

    @override
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.done >= self.needed:
            self.seconds.append(_now(trainer) - self._began)
        self.done += 1
        self._progress.write(b".")
        if self.done == self.until or sum(self.seconds) > _TIMING_S:
            raise _Enough

    def ran_out_of_data(self, trainer: pl.Trainer) -> bool:
        return self.done > 0 and self.done >= trainer.num_training_batches


def _now(trainer: pl.Trainer) -> float:
    """Seconds, once the device has done what it was given."""
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    return time.perf_counter()


def _too_few(done: int, job: Job, a_step: int) -> TargetError:
    each = f" of {a_step} batches each" if a_step > 1 else ""
    need = (job.warmup_steps + job.steps) * a_step
    batches = f"{done} batch" + ("es" if done != 1 else "")
    return TargetError(
        f"{job.target} gives {batches} an epoch and {need} are needed, for {job.warmup_steps} steps to warm up and "
        f"{job.steps} to count{each}: ask for fewer by --steps, or give smaller batches or more data."
    )


def _with_notes(report: MemoryReport) -> MemoryReport:
    if report.categories.get(Category.OPTIMIZER_STATE, 0):
        return report
    note = (
        "No optimizer state is in this peak: the optimizer keeps none, or its first steps were skipped since gradients "
        "were not finite."
    )
    return replace(report, notes=(*report.notes, note))


def _end_with_parent() -> None:
    """When the parent is gone, so that no one waits for the figures, end this process and its workers.

    A network that asks for input meets the end of its input at once: there is nobody to answer.
    """
    if sys.stdin is None:
        return
    pipe, nothing = os.dup(0), os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)

    def wait() -> None:
        while os.read(pipe, 1024):  # until the end of the pipe, which the parent's end brings about
            pass
        if hasattr(os, "killpg") and os.getpgid(0) == os.getpid():
            os.killpg(0, signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=wait, daemon=True, name="end-with-parent").start()
