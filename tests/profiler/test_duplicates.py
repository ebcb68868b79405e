"""Values saved in two precisions: those that are there are found, and nothing else is."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lightning_mpt.profiler import Category, Duplicate, MemoryRecorder, MemoryReport
from lightning_mpt.profiler.collect.duplicates import PIECE, SAMPLES, DuplicateFinder
from lightning_mpt.profiler.ledger import replay
from lightning_mpt.profiler.recording import Recording

from .loops import LOOPS, mlp


class Widened(nn.Module):
    """Saves its exponential in the type that it came in, and once more in FP32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.exp().float().square()


class Shaped(nn.Module):
    """Saves tensors of one shape in two types, made by `make` from the input."""

    def __init__(self, make: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide, narrow = self.make(x)
        return wide.square().sum() + narrow.square().sum().float()


def record(module: nn.Module, x: torch.Tensor, *, warmup_steps: int = 1, **options) -> MemoryReport:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    with MemoryRecorder(module, optimizer, warmup_steps=warmup_steps, **options) as recorder:
        for _ in range(warmup_steps + 1):
            module(x).float().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    return recorder.report


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("warmup_steps", [0, 1])
def test_an_fp32_copy_of_a_half_tensor_is_found(dtype: torch.dtype, warmup_steps: int) -> None:
    module = nn.Sequential(nn.Linear(64, 128, dtype=dtype), Widened(), nn.ReLU())
    report = record(module, torch.randn(32, 64).to(dtype), warmup_steps=warmup_steps)
    name = str(dtype).removeprefix("torch.")
    assert report.duplicates == (Duplicate("1", (32, 128), ("float32", name), 32 * 128 * 2),)


def test_the_half_copies_of_weights_that_autocast_keeps_are_found() -> None:
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 8))
    with torch.autocast("cpu", torch.bfloat16):
        found = record(module, torch.randn(16, 64)).duplicates
    # The first layer's is not saved: its input needs no gradient.
    assert sorted((duplicate.module, duplicate.shape) for duplicate in found) == [("2", (256, 128)), ("4", (8, 256))]
    assert {duplicate.dtypes for duplicate in found} == {("float32", "bfloat16")}
    assert sum(duplicate.bytes for duplicate in found) == 2 * (256 * 128 + 8 * 256)


def test_a_transposed_copy_and_a_small_view_of_it_are_found() -> None:
    def make(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        half = x.exp().half()
        return half.t().float(), half[:3]

    found = record(nn.Sequential(nn.Linear(64, 128), Shaped(make)), torch.randn(16, 64)).duplicates
    assert [(duplicate.module, duplicate.bytes) for duplicate in found] == [("1", 16 * 128 * 2)]


OTHERS: dict[str, Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]] = {
    "equal shapes": lambda x: (x.exp(), x.sin().half()),
    "zeros": lambda x: (x * 0.0, (x * 0.0).half()),
    "ones": lambda x: (x * 0.0 + 1, (x * 0.0 + 1).half()),
    "not a number": lambda x: (x * float("nan"), (x * float("nan")).half()),
    "equal but for one element": lambda x: (y := x.exp() * 1, y.half().index_fill(0, torch.tensor([3]), 7.0)),
    "too small": lambda x: (y := x.exp()[:1, : SAMPLES - 1] * 1, y.half()),
    "one type": lambda x: (y := x.exp() * 1, y.clone()),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_duplicate_is_not_listed(name: str) -> None:
    module = nn.Sequential(nn.Linear(64, 128), Shaped(OTHERS[name]))
    assert record(module, torch.randn(16, 64)).duplicates == ()


@pytest.mark.parametrize("name", ["mlp", "convnet", "gpt2-checkpointed"])
def test_a_model_of_one_type_has_none(name: str) -> None:
    loop = LOOPS[name]()
    with MemoryRecorder(loop.module, loop.optimizer) as recorder:
        loop.step(0)
        recorder.step()
    assert recorder.report.duplicates == ()


def test_a_difference_in_the_last_piece_is_seen() -> None:
    wide = torch.randn(2 * PIECE + 10)
    for changed in (False, True):
        narrow = wide.half()
        if changed:
            narrow[-1] += 1
        finder = DuplicateFinder()
        finder.add(wide, "a")
        finder.add(narrow, "b")
        assert len(finder.find()) == (not changed)


def test_a_value_in_three_types_is_two_too_many() -> None:
    wide = torch.randn(100, dtype=torch.float64).half().double()
    tensors = [wide, wide.float(), wide.half(), wide.half()]
    finder = DuplicateFinder()
    for i, tensor in enumerate(tensors):
        finder.add(tensor, str(i))
        finder.add(tensor[:70], "a view of it")
    assert [(found.module, found.bytes) for found in finder.find()] == [("1", 400), ("2", 200), ("3", 200)]


def test_nothing_is_kept_alive() -> None:
    gc.disable()
    try:
        finder = DuplicateFinder()
        wide = torch.randn(1000)
        narrow = wide.half()
        finder.add(wide, None)
        finder.add(narrow, None)
        dies = StorageWeakRef(narrow.untyped_storage())
        assert len(finder.find()) == 1
        del narrow
        assert dies.expired()
        assert finder.find() == []
    finally:
        gc.enable()


def test_looking_for_them_is_no_part_of_the_report(tmp_path) -> None:
    """In a counted step, too, when there is no other: the same peak and the same moments as where nothing is sought."""
    reports = []
    for steps in (0, 1):
        module = nn.Sequential(nn.Linear(64, 4096, dtype=torch.half), Widened())
        torch.manual_seed(0)
        trace = tmp_path / f"{steps}.json"
        report = record(module, torch.randn(256, 64).half(), warmup_steps=steps, save_trace=trace)
        assert len(report.duplicates) == 1
        reports.append(report)
    searched, plain = reports
    assert searched.peak_bytes == plain.peak_bytes
    assert searched.categories == plain.categories
    assert {name: phase.peak_bytes for name, phase in searched.phases.items()} == {
        name: phase.peak_bytes for name, phase in plain.phases.items()
    }
    recording = Recording.load(tmp_path / "0.json")
    (own,) = recording.own
    during = [event for event in recording.events if own.start_ns <= event.time_ns <= own.end_ns and event.bytes > 0]
    assert len(during) > 3
    assert not {(e.time_ns, e.address) for e in during} & {(b.born_ns, b.address) for b in replay(recording).blocks}


def test_a_search_that_fails_is_a_note_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nMore of it.")

    monkeypatch.setattr(DuplicateFinder, "find", fail)
    loop = mlp()
    with MemoryRecorder(loop.module, loop.optimizer) as recorder:
        loop.step(0)
        recorder.step()
    assert recorder.report.notes == ("Values saved in two precisions were not looked for: CUDA out of memory.",)
    assert recorder.report.categories[Category.UNATTRIBUTED] < 64


def test_recording_half_under_autocast_changes_no_result() -> None:
    def losses(recorded: bool) -> list[float]:
        loop = mlp()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            if not recorded:
                return [loop.step(i) for i in range(3)]
            with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=1) as recorder:
                found = []
                for i in range(3):
                    found.append(loop.step(i))
                    recorder.step()
        assert recorder.report.duplicates
        return found

    assert losses(True) == losses(False)
