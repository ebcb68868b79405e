"""MemoryProfiler where fit ends in an exception, or one passes by."""

import sys
from contextlib import suppress
from typing import Any

import lightning as L
import pytest
import torch

from lightning_mpt.profiler import MemoryProfiler, MemoryReport

from .test_lightning import Classifier, assert_all_is_off, data, fit, trainer


@pytest.mark.parametrize("warmup_steps", [2, 3], ids=["counted", "warming-up"])
@pytest.mark.parametrize("where", ["training_step", "on_after_backward", "on_train_batch_end"])
@pytest.mark.parametrize("while_handling", [False, True], ids=["", "while-handling-another"])
def test_an_exception_switches_it_off(
    where: str, while_handling: bool, warmup_steps: int, tmp_path: Any, capsys: Any
) -> None:
    module = Classifier(fail_in=where)
    profiler = MemoryProfiler(warmup_steps=warmup_steps)
    built = trainer(profiler, tmp_path)
    callbacks = len(built.callbacks)
    try:
        if while_handling:
            raise KeyError("an older one")
    except KeyError:
        with pytest.raises(RuntimeError, match="the step fails"):
            built.fit(module, data())
    else:
        with pytest.raises(RuntimeError, match="the step fails"):
            built.fit(module, data())
    assert_all_is_off(module, built, callbacks)
    counted = warmup_steps < 3  # the third step is the last that came to its end
    if counted:
        assert profiler.report.notes == ("RuntimeError ended the recording after 1 step.",)
        assert MemoryReport.load(tmp_path / "memory_report.json") == profiler.report
    else:
        with pytest.raises(RuntimeError, match=r"ended in .*RuntimeError"):
            _ = profiler.report
    assert capsys.readouterr().out.count("phase peaks") == int(counted)


@pytest.mark.parametrize("error", [RuntimeError("the step fails"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_what_was_recorded_is_told_where_fit_ends_in_an_exception(error: BaseException, tmp_path: Any, capsys) -> None:
    class Late(Classifier):
        def _fail(self, where: str, step: int) -> None:
            if where == "training_step" and step == 6:
                raise error

    profiler = MemoryProfiler()
    with pytest.raises((RuntimeError, SystemExit)):
        fit(Late(), tmp_path, profiler)
    assert capsys.readouterr().out.count("phase peaks") == 1
    assert MemoryReport.load(tmp_path / "memory_report.json") == profiler.report


class Raising(L.Callback):
    """Its hook `name` raises `error`."""

    def __init__(self, name: str, error: BaseException) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        setattr(self, name, fail)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("where", ["on_train_epoch_end", "on_train_end", "on_fit_end", "teardown"])
@pytest.mark.parametrize("steps", [3, 20], ids=["after the recording", "while recording"])
def test_what_was_recorded_is_told_where_fit_ends_between_batches(
    steps: int, where: str, error: BaseException, tmp_path: Any, capsys: Any
) -> None:
    module, profiler = Classifier(), MemoryProfiler(steps=steps)
    built = trainer(profiler, tmp_path, callbacks=[Raising(where, error)])
    callbacks = len(built.callbacks)
    with pytest.raises((OSError, SystemExit)):
        built.fit(module, data())
    assert profiler.report.steps == min(steps, 6)
    assert capsys.readouterr().out.count("phase peaks") == 1
    assert MemoryReport.load(tmp_path / "memory_report.json") == profiler.report
    assert_all_is_off(module, built, callbacks)


def test_an_exception_outside_every_action_is_heard_of_too(tmp_path: Any, capsys: Any) -> None:
    class Interrupted(Classifier):
        def setup(self, stage: str) -> None:
            self.trainer.fit_loop.on_advance_end = self.interrupt

        def interrupt(self) -> None:
            raise KeyboardInterrupt

    profiler = MemoryProfiler(steps=20)
    module, built = Interrupted(), trainer(profiler, tmp_path)
    with pytest.raises(SystemExit):
        built.fit(module, data())
    assert profiler.report.notes == ("KeyboardInterrupt ended the recording after 6 steps.",)
    assert capsys.readouterr().out.count("phase peaks") == 1


def test_an_older_exception_being_handled_is_no_reason_to_stop(tmp_path: Any) -> None:
    try:
        raise KeyError("out of memory, say: try again, smaller")
    except KeyError:
        assert sys.exc_info()[0] is KeyError
        assert fit(Classifier(), tmp_path).profiler.report.steps == 3


def test_an_exception_that_is_caught_before_the_recording_does_not_prevent_it(tmp_path: Any) -> None:
    class Catching(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if batch_idx == 0:
                with suppress(KeyError), self.trainer.profiler.profile("mine"):
                    raise KeyError("no matter")
            return super().training_step(batch, batch_idx)

    assert fit(Catching(), tmp_path).profiler.report.steps == 3
