"""The sources: the CPU's against what is allocated, CUDA's against a stand-in for torch's functions."""

import pickle
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mpt.profiler import AllocatorHealth, MemoryRecorder, MemoryReport
from lightning_mpt.profiler.collect import session
from lightning_mpt.profiler.collect.health import allocator_health
from lightning_mpt.profiler.collect.sources import CPUSource, CUDASource, RecordingLost, source_for

from .test_cuda_trace import BASE, entry, segment


def test_cpu_events_tell_of_every_allocation_in_its_time() -> None:
    source = CPUSource()
    source.start()
    around = []
    for size in range(100, 200):
        before = time.time_ns()
        tensor = torch.empty(size)
        around.append((before, tensor.data_ptr(), tensor.nbytes, time.time_ns()))
        del tensor
    start, events = source.stop()
    assert start == []
    born = [event for event in events if event.bytes > 0]
    assert [(event.address, event.bytes) for event in born] == [(address, size) for _, address, size, _ in around]
    for event, (before, _, _, after) in zip(born, around, strict=True):
        assert before <= event.time_ns <= after  # one clock: what clock_error_ns = 0 says
    assert len(events) == 2 * len(born)
    assert (source.peak_bytes(), source.reserved_bytes()) == (None, None)


def test_cpu_source_stops_once_and_can_be_aborted() -> None:
    source = CPUSource()
    assert source.stop() == ([], [])
    source.start()
    source.abort()
    source.abort()
    assert not torch._C._autograd._profiler_enabled()


@pytest.mark.parametrize("ends", ["before", "after", "before, with memory"])
def test_a_profile_of_someone_else_that_took_the_place_of_the_cpu_sources_is_noticed(ends: str) -> None:
    source, other = CPUSource(), torch.autograd.profiler.profile(profile_memory="memory" in ends, use_kineto=True)
    source.start()
    with other if ends != "after" else nullcontext():
        torch.empty(100)
    with (
        other if ends == "after" else nullcontext(),
        pytest.raises(RecordingLost, match=r"torch.profiler was started in the recorded steps by someone else"),
    ):
        source.stop()
    assert source.stop() == ([], [])
    assert not torch._C._autograd._profiler_enabled()


def test_no_source_for_other_devices() -> None:
    with pytest.raises(ValueError, match=r"'mps:0' cannot be recorded: only 'cpu' and 'cuda'"):
        source_for(torch.device("mps", 0))


class FakeCUDA:
    """Stands in for the functions of torch that CUDASource calls."""

    def __init__(self, patch: pytest.MonkeyPatch, *, history_on: bool = False, backend: str = "native") -> None:
        self.calls: list[Any] = []
        self.history_on = history_on
        self.trace: list[dict[str, Any]] = []
        self.more: list[dict[str, Any]] = []
        self.stats = {"allocated_bytes.all.peak": 4096, "reserved_bytes.all.peak": 1 << 21}
        patch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: backend)
        patch.setattr(torch.cuda.memory, "_record_memory_history", self._record)
        patch.setattr(torch.cuda.memory, "memory_snapshot", self._segments)
        patch.setattr(torch.cuda.memory, "_snapshot", self.snapshot)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.calls.append(("reset", device)))
        patch.setattr(torch.cuda, "memory_stats", lambda device: self.stats)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (3 << 20, 8 << 20))
        patch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: self.history_on, raising=False)

    def _record(self, enabled: str | None, **options: Any) -> None:
        self.history_on = enabled is not None
        self.calls.append((enabled, options))

    def _segments(self, *, include_traces: bool) -> list[dict[str, Any]]:
        assert not include_traces
        held = segment(BASE, (1024, "active_allocated", 600), ((1 << 21) - 1024, "inactive"))
        return [held, *self.more, segment(BASE << 1, (512, "active_allocated"), device=1)]

    def snapshot(self) -> dict[str, Any]:
        return {"segments": [], "device_traces": [self.trace, []], "allocator_settings": {"max_split_size": -1}}


def test_cuda_history_is_on_between_start_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCUDA(monkeypatch)
    source = CUDASource(torch.device("cuda", 0))
    source.start()
    assert fake.history_on
    assert fake.calls == [("all", {"context": None, "max_entries": source.max_entries, "clear_history": True})]
    late_us = time.time_ns() // 1000 + 10
    fake.trace += [entry("alloc", BASE + 1024, 100, time_us=1), entry("alloc", BASE + 1024, 200, time_us=late_us)]
    start, events = source.stop()
    assert not fake.history_on
    assert [(event.address, event.bytes, event.requested_bytes) for event in start] == [(BASE, 1024, 600)]
    assert [(event.address, event.bytes, event.requested_bytes) for event in events] == [(BASE + 1024, 512, 200)]
    assert events[0].time_ns == late_us * 1000
    assert source.stop() == ([], [])


def test_a_snapshot_has_python_stacks_and_is_kept_for_who_asked_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCUDA(monkeypatch)
    source = source_for(torch.device("cuda", 0), keep_snapshot=True)
    source.start()
    enabled, options = fake.calls[0]
    assert (enabled, options["context"], options["stacks"]) == ("all", "alloc", "python")
    source.stop()
    assert source.snapshot == fake.snapshot()


def record_on_cuda(monkeypatch: pytest.MonkeyPatch, path: Path) -> tuple[FakeCUDA, MemoryReport]:
    """The report of a step that is recorded as if on CUDA, with its snapshot at `path`."""
    fake = FakeCUDA(monkeypatch)
    fake.stats |= STATS
    monkeypatch.setattr(session, "device_of", lambda module: torch.device("cuda", 0))
    with MemoryRecorder(nn.Linear(2, 2), save_snapshot=path) as recorder:
        recorder.step()
    return fake, recorder.report


def test_a_recorder_writes_the_snapshot_as_memory_viz_reads_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "memory_snapshot.pickle"
    fake, report = record_on_cuda(monkeypatch, path)
    assert pickle.loads(path.read_bytes()) == fake.snapshot()
    assert report.notes == ()


def test_a_snapshot_that_cannot_be_written_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, report = record_on_cuda(monkeypatch, tmp_path)
    assert "save_snapshot wrote nothing: [Errno" in report.notes[0]


def test_on_a_cpu_there_is_no_snapshot_and_a_note_says_so(tmp_path: Path) -> None:
    with MemoryRecorder(nn.Linear(2, 2), save_snapshot=tmp_path / "memory_snapshot.pickle") as recorder:
        recorder.step()
    assert "save_snapshot wrote nothing: only CUDA" in recorder.report.notes[0]
    assert list(tmp_path.iterdir()) == []


def test_a_history_that_someone_else_records_is_left_on(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCUDA(monkeypatch, history_on=True)
    source = CUDASource(torch.device("cuda", 0))
    source.start()
    source.stop()
    source.abort()
    assert fake.history_on
    assert fake.calls == []


def test_an_aborted_cuda_recording_is_off(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCUDA(monkeypatch)
    source = CUDASource(torch.device("cuda", 0))
    source.abort()
    assert fake.calls == []
    source.start()
    source.abort()
    assert not fake.history_on


def test_cuda_peaks_are_the_allocators_own(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCUDA(monkeypatch)
    source = CUDASource(torch.device("cuda", 1))
    source.reset_peak()
    assert fake.calls == [("reset", torch.device("cuda", 1))]
    assert (source.peak_bytes(), source.reserved_bytes()) == (4096, 1 << 21)


def test_an_allocator_without_history_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCUDA(monkeypatch, backend="cudaMallocAsync")
    with pytest.raises(ValueError, match="'cudaMallocAsync', which keeps no history"):
        CUDASource(torch.device("cuda", 0))


def test_a_request_that_failed_is_known_from_the_history(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCUDA(monkeypatch)
    source = CUDASource(torch.device("cuda", 0))
    source.start()
    late_us = time.time_ns() // 1000 + 10
    for time_us in (1, late_us):
        failed = entry("oom", 0, 5000, time_us=time_us)
        failed["device_free"] = failed.pop("addr")
        fake.trace.append(failed)
    assert source.stop() == (source.live_blocks(), [])
    assert source.failure == (late_us * 1000, 5000)


def test_events_are_counted_by_the_allocators_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeCUDA(monkeypatch)
    fake.stats |= {"allocation.all.allocated": 100, "allocation.all.freed": 90}
    source = CUDASource(torch.device("cuda", 0), max_events=10)
    source.start()
    fake.stats |= {"allocation.all.allocated": 103, "allocation.all.freed": 92}
    assert source.event_count() == 3 + 2 * 2
    fake.trace += [entry("alloc", BASE, 100)] * source.max_entries
    source.stop()
    assert source.overflowed


# -- the allocator's health ---------------------------------------------------------------------------------------

STATS = {
    "reserved_bytes.all.peak": 5000,
    "reserved_bytes.all.current": 4000,
    "allocated_bytes.all.peak": 4200,
    "num_alloc_retries": 3,
}


def test_health_is_what_the_allocator_and_the_device_say() -> None:
    assert allocator_health(STATS, (1500, 8000), 64, retries_before=1) == AllocatorHealth(
        reserved_bytes=5000,
        fragmented_bytes=800,
        workspace_bytes=64,
        outside_bytes=8000 - 1500 - 4000,
        total_bytes=8000,
        retries=2,
    )


def test_health_is_never_negative() -> None:
    """Another process may free memory between the two questions."""
    health = allocator_health({**STATS, "allocated_bytes.all.peak": 5001}, (7000, 8000), 0, retries_before=3)
    assert (health.fragmented_bytes, health.outside_bytes, health.retries) == (0, 0, 0)


def test_the_source_asks_for_it_and_tells_workspaces_from_weights_of_their_size(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4:2")  # KiB
    fake = FakeCUDA(monkeypatch)
    fake.stats |= STATS
    fake.more = [segment(BASE << 2, (8192, "active_allocated"), (8192, "active_allocated"), (8192, "inactive"))]
    source = CUDASource(torch.device("cuda", 0))
    source.start()
    fake.stats["num_alloc_retries"] = 4
    health = source.health({(BASE << 2) + 8192: "a weight"})
    assert health == allocator_health(fake.stats, (3 << 20, 8 << 20), 8192, retries_before=3)
    assert health.retries == 1
