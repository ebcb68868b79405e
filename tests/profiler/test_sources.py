"""The sources: the CPU's against what is allocated, CUDA's against a stand-in for torch's functions."""

import time
from typing import Any

import pytest
import torch

from lightning_mpt.profiler.sources import CPUSource, CUDASource, source_for

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


def test_no_source_for_other_devices() -> None:
    with pytest.raises(ValueError, match=r"'mps:0' cannot be recorded: only 'cpu' and 'cuda'"):
        source_for(torch.device("mps", 0))


class FakeCUDA:
    """Stands in for the functions of torch that CUDASource calls."""

    def __init__(self, patch: pytest.MonkeyPatch, *, history_on: bool = False, backend: str = "native") -> None:
        self.calls: list[Any] = []
        self.history_on = history_on
        self.trace: list[dict[str, Any]] = []
        self.stats = {"allocated_bytes.all.peak": 4096, "reserved_bytes.all.peak": 1 << 21}
        patch.setattr(torch.cuda.memory, "get_allocator_backend", lambda: backend)
        patch.setattr(torch.cuda.memory, "_record_memory_history", self._record)
        patch.setattr(torch.cuda.memory, "memory_snapshot", self._segments)
        patch.setattr(torch.cuda.memory, "_snapshot", self._snapshot)
        patch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: self.calls.append(("reset", device)))
        patch.setattr(torch.cuda, "memory_stats", lambda device: self.stats)
        patch.setattr(torch._C, "_cuda_isHistoryEnabled", lambda: self.history_on, raising=False)

    def _record(self, enabled: str | None, **options: Any) -> None:
        self.history_on = enabled is not None
        self.calls.append((enabled, options))

    def _segments(self, *, include_traces: bool) -> list[dict[str, Any]]:
        assert not include_traces
        held = segment(BASE, (1024, "active_allocated", 600), ((1 << 21) - 1024, "inactive"))
        return [held, segment(BASE << 1, (512, "active_allocated"), device=1)]

    def _snapshot(self) -> dict[str, Any]:
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
