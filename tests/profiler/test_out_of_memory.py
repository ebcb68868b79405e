"""Memory runs out: the table of that moment comes, and the exception is the one that was."""

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_mpt.profiler import Category, MemoryProfiler, MemoryRecorder, MemoryReport, out_of_memory
from lightning_mpt.profiler.collect.sources import CPUSource
from lightning_mpt.profiler.ledger import replay
from lightning_mpt.profiler.out_of_memory import failed_request_bytes, is_out_of_memory
from lightning_mpt.profiler.recording import Claim, Event, Mark, Recording, Window
from lightning_mpt.profiler.show.advisor import advise
from lightning_mpt.profiler.show.words import format_bytes

from .hooks import assert_all_is_off, hooks_on
from .limit import MemoryLimit
from .test_lightning import Classifier, data, trainer

WIDTH = 256
PARAMETERS = 4 * (WIDTH * WIDTH + WIDTH)
"""Of `Deep`."""
LIMITS = {"forward": 1024, "backward": 2 * PARAMETERS, "optimizer_step": 6 * PARAMETERS}
"""Bytes at which the first step of `Deep` under AdamW fails: of each parameter 4 are its gradient's, 8 its moments'."""


class Deep(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))


def train(recorder: MemoryRecorder, module: nn.Module, optimizer: Any, limit: Callable[[int], Any], steps: int) -> None:
    """Some steps; `limit(i)` is a context manager for each."""
    with recorder:
        for i in range(steps):
            with limit(i):
                module(torch.ones(1, WIDTH)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            recorder.step()


def fail(limit: MemoryLimit, at_step: int = 0, **options: Any) -> tuple[MemoryRecorder, nn.Module]:
    """Run `Deep` into the limit in one of its steps."""
    module = Deep()
    optimizer = torch.optim.AdamW(module.parameters())
    recorder = MemoryRecorder(module, optimizer, **options)

    def limited(i: int) -> AbstractContextManager[Any]:
        return limit if i == at_step else nullcontext()

    with pytest.raises(torch.OutOfMemoryError) as info:
        train(recorder, module, optimizer, limited, at_step + 1)
    assert info.value is limit.raised
    assert info.value.__context__ is None
    assert info.traceback[-1].name == "__torch_dispatch__"  # where it was raised, and no further
    return recorder, module


@pytest.mark.parametrize("phase", LIMITS)
def test_a_recorder_shows_what_was_live(phase: str, capsys: Any) -> None:
    recorder, module = fail(MemoryLimit(LIMITS[phase]))
    report = recorder.out_of_memory_report
    assert report is not None
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.categories[Category.WEIGHTS] == 4 * PARAMETERS
    gradients = report.categories[Category.GRADIENTS]
    state = report.categories[Category.OPTIMIZER_STATE]
    if phase == "forward":
        assert gradients == state == 0
    elif phase == "backward":
        assert 0 < gradients <= 2 * PARAMETERS
        assert report.categories[Category.ACTIVATIONS] > 0
    else:
        assert gradients == 4 * PARAMETERS
        assert 0 < state <= 2 * PARAMETERS + 64
    assert list(report.phases)[-1] == phase
    assert report.categories[Category.UNATTRIBUTED] < 64
    printed = capsys.readouterr()
    assert printed.out == ""
    assert f"Out of memory on cpu, in {phase.replace('_', ' ')}: 2.50 GiB more was asked for" in printed.err
    assert "weights" in printed.err
    assert (
        printed.err.replace("\n", " ").count("2.50 GiB more was asked for in") == 1
    )  # the advice is on this very request
    with pytest.raises(RuntimeError, match=r"no memory report: .*OutOfMemoryError.*`out_of_memory_report`"):
        _ = recorder.report
    assert_all_is_off(module)


def test_it_fails_in_a_later_step_too() -> None:
    recorder, _ = fail(MemoryLimit(LIMITS["backward"]), at_step=3, warmup_steps=1)
    report = recorder.out_of_memory_report
    assert report is not None
    assert report.categories[Category.OPTIMIZER_STATE] == 8 * PARAMETERS + 8 * 4
    assert 0 < report.categories[Category.GRADIENTS] <= 2 * PARAMETERS
    assert report.steps == 1


def test_where_following_is_cheap_every_step_of_warming_up_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA."""
    monkeypatch.setattr(CPUSource, "follows_warmup", True)
    recorder, _ = fail(MemoryLimit(LIMITS["forward"]), at_step=1, warmup_steps=5)
    report = recorder.out_of_memory_report
    assert report is not None
    assert report.notes == ("Memory ran out: this is what was live then, which is not the peak of a whole step.",)
    assert list(report.phases) == ["forward"]

    module = Deep()
    optimizer = torch.optim.AdamW(module.parameters())
    recorder = MemoryRecorder(module, optimizer, warmup_steps=3, steps=2)
    on = []

    def look(i: int) -> AbstractContextManager[Any]:
        on.append(bool(hooks_on(module)))
        return nullcontext()

    train(recorder, module, optimizer, look, 7)
    assert on == [True] * 5 + [False] * 2
    assert recorder.report.steps == 2
    assert {forward.calls for forward in recorder.report.forwards.values()} == {2}


@pytest.mark.parametrize("when", ["before", "after"])
def test_while_nothing_is_recorded_what_has_owners_is_shown(when: str, capsys: Any) -> None:
    at_step = 1 if when == "before" else 4
    recorder, module = fail(MemoryLimit(LIMITS["optimizer_step"] // 6), at_step=at_step, warmup_steps=3, steps=1)
    report = recorder.out_of_memory_report
    assert report is not None
    assert report.categories[Category.WEIGHTS] == 4 * PARAMETERS
    assert report.categories[Category.OPTIMIZER_STATE] == 8 * PARAMETERS + 8 * 4
    assert "Nothing was being recorded" in report.notes[-1]
    assert "Out of memory on cpu: 2.50 GiB more was asked for" in capsys.readouterr().err
    assert_all_is_off(module)
    if when == "after":
        assert recorder.report.steps == 1


def test_a_table_that_cannot_be_shown_is_no_second_exception(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def broken(*_: object) -> None:
        raise KeyError("a hole in the table")

    monkeypatch.setattr(out_of_memory, "_print", broken)
    recorder, module = fail(MemoryLimit(1024))
    assert recorder.out_of_memory_report is not None
    assert "could not be shown: KeyError('a hole in the table')" in capsys.readouterr().err
    monkeypatch.setattr(MemoryReport, "from_recording", broken)
    recorder, module = fail(MemoryLimit(1024))
    assert recorder.out_of_memory_report is None
    assert_all_is_off(module)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"), MemoryError(), torch.OutOfMemoryError()],
    ids=lambda error: type(error).__name__,
)
def test_a_request_of_unknown_size_is_of_that_moment_too(error: Exception, capsys: Any) -> None:
    module = Deep()
    recorder = MemoryRecorder(module, torch.optim.AdamW(module.parameters()))

    def run() -> None:
        with recorder:
            module(torch.ones(64, WIDTH)).square().mean().backward()
            raise error

    with pytest.raises(type(error)):
        run()
    report = recorder.out_of_memory_report
    assert report is not None
    assert report.out_of_memory
    assert report.failed_request_bytes is None
    assert report.peak_bytes < report.phases["backward"].peak_bytes
    printed = " ".join(capsys.readouterr().err.split())
    assert "in optimizer step: more was asked for" in printed
    assert f"Memory ran out in optimizer step, with {format_bytes(report.peak_bytes)} in use" in printed
    assert all((one.saves_bytes or 0) <= report.peak_bytes for one in advise(report))


def test_another_exception_is_none_of_its_business(capsys: Any) -> None:
    module = Deep()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), MemoryRecorder(module) as recorder:
        module(torch.ones(1, 3))
    assert recorder.out_of_memory_report is None
    assert capsys.readouterr().err == ""


# -- in a Trainer -------------------------------------------------------------------------------------------------


class Limited(Classifier):
    """Runs out of memory in one of its steps."""

    def __init__(self, limit: MemoryLimit, at_step: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 512), nn.Linear(512, 512), nn.Linear(512, 10))
        self.limit = limit
        self.at_step = at_step

    def optimizer_step(self, epoch: int, batch_idx: int, *args: Any, **kwargs: Any) -> None:
        with self.limit if batch_idx == self.at_step else nullcontext():
            super().optimizer_step(epoch, batch_idx, *args, **kwargs)


@pytest.mark.parametrize(("limit", "phase"), [(1024, "forward"), (700_000, "backward"), (1_800_000, "optimizer step")])
@pytest.mark.parametrize("at_step", [1, 3])
def test_a_trainer_shows_it(limit: int, phase: str, at_step: int, tmp_path: Any, capsys: Any) -> None:
    module = Limited(MemoryLimit(limit), at_step)
    profiler = MemoryProfiler()
    built = trainer(profiler, tmp_path)
    callbacks = len(built.callbacks)
    with pytest.raises(torch.OutOfMemoryError) as info:
        built.fit(module, data())
    assert info.value is module.limit.raised
    report = profiler.out_of_memory_report
    assert report is not None
    assert report.categories[Category.WEIGHTS] == 4 * report.parameters
    assert capsys.readouterr().err.count(f"Out of memory on cpu, in {phase}: 2.50 GiB") == 1
    assert MemoryReport.load(tmp_path / "memory_report_out_of_memory.json") == report
    with pytest.raises(RuntimeError, match="what was live then is in `out_of_memory_report`"):
        _ = profiler.report
    assert_all_is_off(module)
    assert len(built.callbacks) == callbacks


def test_a_trainer_shows_it_after_the_recorded_steps(tmp_path: Any) -> None:
    module = Limited(MemoryLimit(1024), at_step=6)
    profiler = MemoryProfiler()
    with pytest.raises(torch.OutOfMemoryError):
        trainer(profiler, tmp_path).fit(module, data())
    assert profiler.report.steps == 3
    assert profiler.out_of_memory_report is not None
    assert "Nothing was being recorded" in profiler.out_of_memory_report.notes[-1]


def test_what_was_live_is_not_kept_alive(tmp_path: Any) -> None:
    """So that whoever catches the exception can try again, smaller."""

    class Kept(Limited):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            local = batch[0] * 2
            self.seen = StorageWeakRef(local.untyped_storage())
            return super().training_step((local, batch[1]), batch_idx)

    module = Kept(MemoryLimit(200_000), at_step=3)
    built = trainer(MemoryProfiler(), tmp_path)
    try:
        built.fit(module, data())
    except torch.OutOfMemoryError:
        assert not module.seen.expired()
        module.limit.raised = None
    gc.collect()
    assert module.seen.expired()
    assert built.profiler.out_of_memory_report is not None


# -- the parts ----------------------------------------------------------------------------------------------------

MESSAGES = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), True, 2 << 30),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 bytes."), True, 512),
    (torch.OutOfMemoryError("Allocation on device"), True, None),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."), True, 4096),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, None),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False, None),
    (ValueError("CUDA error: out of memory"), False, None),
]  # fmt: skip


@pytest.mark.parametrize(("error", "out", "asked"), MESSAGES, ids=[str(error)[:30] for error, _, _ in MESSAGES])
def test_errors_are_known_by_what_they_say(error: Exception, out: bool, asked: int | None) -> None:
    assert is_out_of_memory(error) == out
    assert failed_request_bytes(error) == asked


def test_the_cpus_own_error_is_known() -> None:
    with pytest.raises(RuntimeError) as info:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(info.value)
    assert failed_request_bytes(info.value) == 1 << 60


def test_the_exact_size_comes_from_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    observers: list[Any] = []
    monkeypatch.setattr(torch._C, "_cuda_attach_out_of_memory_observer", observers.append, raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(out_of_memory, "_observing", False)
    monkeypatch.setattr(out_of_memory, "_observed", [])
    out_of_memory.observe_failed_requests()
    assert observers == []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    out_of_memory.observe_failed_requests()
    out_of_memory.observe_failed_requests()
    (observer,) = observers
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert failed_request_bytes(error) == 2 << 30
    observer(0, (2 << 30) + 512, 80 << 30, 1 << 20)
    assert failed_request_bytes(error) == (2 << 30) + 512
    observer(0, 1 << 30, 80 << 30, 1 << 20)  # of an error that someone caught
    assert failed_request_bytes(error) == 2 << 30


def test_the_ledger_ends_where_memory_ran_out(tmp_path: Any) -> None:
    """What is freed after it was live then; what is born in the phase that failed, and has no owner, is temporary."""
    history = Recording(
        device="cuda:0",
        parameters=0,
        start=[Event(0, 1, 1024, 1000)],
        events=[
            Event(10, 2, 512, 400),  # an activation
            Event(20, 3, 512, 512),  # nobody's, and older than the phase that failed
            Event(110, 4, 512, 500),  # nobody's, of that phase
            Event(160, 2, 0, 0),
            Event(170, 5, 4096, 4096),
        ],
        claims=[
            Claim(15, 2, 400, Category.ACTIVATIONS, "0", (100,), "float32"),
            Claim(180, 1, 1000, Category.WEIGHTS, "0", (250,), "float32"),
        ],
        phases=[Mark(0, "forward"), Mark(100, "backward"), Mark(165, "optimizer_step")],
        modules=[Mark(1, "0")],
        windows=[Window(0, 150, None)],
        failed_ns=150,
    )
    peak = replay(history).peak
    assert peak.bytes == 1024 + 3 * 512
    named = {category: size for category, size in peak.categories.items() if size}
    assert named == {
        Category.WEIGHTS: 1000,
        Category.ACTIVATIONS: 400,
        Category.UNATTRIBUTED: 512,
        Category.TEMPORARIES: 500,
        Category.ROUNDING: 24 + 112 + 12,
    }
    report = MemoryReport.from_recording(history)
    assert report.out_of_memory
    assert report.peak_bytes == peak.bytes
    assert {use.bytes for use in report.tensors} == {1000, 400, 512, 500}
    history.save(tmp_path / "trace.json")
    assert MemoryReport.from_trace(tmp_path / "trace.json") == report
