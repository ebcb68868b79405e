"""MemoryRecorder's manners: it changes no result, leaves nothing on, and refuses what it cannot do."""

import gc
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler import ProfilerActivity

from lightning_mpt.profiler import MemoryRecorder
from lightning_mpt.profiler.collect.sources import CPUSource

from .hooks import assert_all_is_off, hooks_on
from .loops import LOOPS, Loop, blocks, mlp, record

# -- recording changes nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOOPS)
def test_recording_changes_no_result(name: str) -> None:
    plain, recorded = LOOPS[name](), LOOPS[name]()
    users = len(hooks_on(recorded.module))
    torch.manual_seed(1)
    losses = [plain.step(i) for i in range(4)]
    torch.manual_seed(1)
    with MemoryRecorder(recorded.module, recorded.optimizer, warmup_steps=1) as recorder:
        again = []
        for i in range(4):
            again.append(recorded.step(i))
            recorder.step()
    assert again == losses
    for a, b in zip(plain.module.parameters(), recorded.module.parameters(), strict=True):
        assert torch.equal(a, b)
    assert len(hooks_on(recorded.module)) == users
    assert not torch._C._autograd._profiler_enabled()


def test_saved_tensors_die_as_early_as_without_recording() -> None:
    gc.disable()
    try:
        loop = mlp()
        seen: list[StorageWeakRef] = []
        with MemoryRecorder(loop.module, loop.optimizer) as recorder:
            hidden = loop.module[:3](torch.randn(32, 64))
            seen.append(StorageWeakRef(hidden.untyped_storage()))
            loss = loop.module[3](hidden).tanh().exp().sum()  # exp and tanh save what they give
            del hidden
            loss.backward()
            assert seen[0].expired()
            recorder.step()
    finally:
        gc.enable()


def test_a_changed_saved_tensor_is_still_an_error() -> None:
    loop = mlp()
    with MemoryRecorder(loop.module, loop.optimizer):
        y = torch.randn(8, 64, requires_grad=True).exp()
        y.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace"):
            y.sum().backward()


def test_double_backward_through_recorded_tensors() -> None:
    def penalty(loop: Loop) -> torch.Tensor:
        x = torch.ones(8, 64, requires_grad=True)
        (gradient,) = torch.autograd.grad(loop.module[0](x).tanh().sum(), x, create_graph=True)
        gradient.square().sum().backward()
        return loop.module[0].weight.grad

    plain, loop = mlp(), mlp()
    expected = penalty(plain)
    with MemoryRecorder(loop.module, loop.optimizer) as recorder:
        assert torch.equal(penalty(loop), expected)
        recorder.step()
    assert sum(recorder.report.categories.values()) == recorder.report.peak_bytes


# -- on and off ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["forward", "backward", "optimizer", "between"])
def failing(request: pytest.FixtureRequest) -> Loop:
    """A loop that fails somewhere in its step, or right after it."""
    loop = blocks(reentrant=False)
    if request.param == "forward":
        loop.module.blocks[2].register_forward_hook(_fail)
    elif request.param == "backward":
        loop.module.blocks[2][2].weight.register_hook(_fail)
    elif request.param == "optimizer":
        loop.optimizer.register_step_pre_hook(_fail)
    return loop


def _fail(*_: object) -> None:
    raise RuntimeError("the step fails")


def test_an_exception_switches_everything_off(failing: Loop) -> None:
    users = len(hooks_on(failing.module))
    recorder = MemoryRecorder(failing.module, failing.optimizer)

    def run() -> None:
        with recorder:
            failing.step(0)
            _fail()

    with pytest.raises(RuntimeError, match="the step fails"):
        run()
    assert len(hooks_on(failing.module)) == users
    assert not torch._C._autograd._profiler_enabled()
    with pytest.raises(RuntimeError, match=r"no memory report: the `with` block ended in <class 'RuntimeError'>"):
        _ = recorder.report


@pytest.mark.parametrize("error", [ValueError("no batch"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_what_was_counted_before_an_exception_is_reported(error: BaseException) -> None:
    loop, plain = mlp(), mlp()
    recorder = MemoryRecorder(loop.module, loop.optimizer)

    def run() -> None:
        with recorder:
            for i in range(2):
                loop.step(i)
                recorder.step()
            loop.module(torch.randn(8, 64)).sum()  # of a third, which does not count
            raise error

    with pytest.raises(type(error)):
        run()
    assert hooks_on(loop.module) == []
    assert not torch._C._autograd._profiler_enabled()
    report, whole = recorder.report, record(plain, warmup_steps=0)
    assert report.notes == (f"{type(error).__name__} ended the recording after 2 steps.",)
    assert (report.steps, report.peak_bytes, report.categories) == (2, whole.peak_bytes, whole.categories)


def test_nothing_stays_on_where_the_report_of_an_exception_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = mlp()
    recorder = MemoryRecorder(loop.module, loop.optimizer)
    monkeypatch.setattr(CPUSource, "stop", _fail)

    def run() -> None:
        with recorder:
            loop.step(0)
            recorder.step()
            raise ValueError("no batch")

    with pytest.raises(ValueError, match="no batch"):
        run()
    assert hooks_on(loop.module) == []
    assert not torch._C._autograd._profiler_enabled()


def test_a_trace_that_cannot_be_written_costs_a_warning_and_no_report(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match=r"The trace was not written to .*trace\.json: File exists"):
        report = record(mlp(), save_trace=tmp_path / "file" / "trace.json")
    assert report.steps == 2


def test_nothing_is_on_outside_the_recorded_steps() -> None:
    loop = mlp()
    on = []
    with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=2, steps=1) as recorder:
        for i in range(5):
            on.append((bool(hooks_on(loop.module)), torch._C._autograd._profiler_enabled()))
            loop.step(i)
            recorder.step()
    # The last step of warming up is followed, so that what it leaves alive is known.
    assert on == [(False, False), (True, True), (True, True), (False, False), (False, False)]
    assert recorder.report.steps == 1


def test_the_report_is_there_as_soon_as_the_steps_are_over() -> None:
    loop = mlp()
    with MemoryRecorder(loop.module, loop.optimizer, steps=1) as recorder:
        with pytest.raises(RuntimeError, match="no memory report"):
            _ = recorder.report
        loop.step(0)
        recorder.step()
        assert recorder.report.steps == 1


def test_a_recorder_can_be_used_again() -> None:
    loop = mlp()
    recorder = MemoryRecorder(loop.module, loop.optimizer, steps=1)
    peaks = []
    for _ in range(3):
        with recorder:
            loop.step(0)
            recorder.step()
        peaks.append(recorder.report.peak_bytes)
    assert peaks[1] == peaks[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 1.5}, "steps=1.5"),
        ({"max_events": 0}, "max_events=0"),
    ],
)
def test_wrong_counts_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MemoryRecorder(nn.Linear(2, 2), **options)


def test_a_second_recording_at_once_is_refused() -> None:
    loop = mlp()
    with (
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True),
        pytest.raises(RuntimeError, match="recording already"),
        MemoryRecorder(loop.module, loop.optimizer),
    ):
        pass
    assert_all_is_off(loop.module)


def test_a_device_that_tells_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="'meta' cannot be recorded"), MemoryRecorder(nn.Linear(2, 2, device="meta")):
        pass


@pytest.mark.filterwarnings("ignore:Profiler clears events at the end of each cycle:UserWarning")
@pytest.mark.parametrize("at_step", [1, 2])
def test_a_profiler_that_the_loop_starts_itself_is_the_reason_why_there_is_no_report(at_step: int) -> None:
    loop = mlp()
    with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=1) as recorder:
        for i in range(3):
            with torch.profiler.profile(activities=[ProfilerActivity.CPU]) if i == at_step else nullcontext():
                loop.step(i)
            recorder.step()
    with pytest.raises(RuntimeError, match=r"no memory report: torch.profiler was started in the recorded steps by .*"):
        _ = recorder.report
    assert_all_is_off(loop.module)
    assert record(loop).steps == 2
