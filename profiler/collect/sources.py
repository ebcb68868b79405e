"""Where allocation events come from: the CPU allocator, the CUDA caching allocator.

A source is started, stopped, and gives events in the one form that the ledger knows. What torch reports is turned into
events by pure functions (`cuda_trace.py` for CUDA), which are tested on recorded and hand-made traces without a GPU.

- CPU: `torch.profiler` with `profile_memory`. It reports every allocation and free of the default CPU allocator, with
  the size asked for, in nanoseconds of the Unix clock; frees of blocks born before the recording are not reported, and
  there is no list of what is alive.
- CUDA: the caching allocator's history (`torch.cuda.memory._record_memory_history`) and its own statistics. A block
  counts as allocated until its free is *requested*, as `torch.cuda.memory_allocated` counts it.
"""

import os
import time
from collections.abc import Container, Sequence
from typing import Any

import torch

from ..figures import AllocatorHealth
from ..recording import Event
from .cuda_trace import last_failure, parse_segments, parse_trace, workspace_bytes
from .health import allocator_health, workspaces_alive

MAX_EVENTS = 2_000_000
_OURS = "lightning-mpt memory recording"
"""The name of an event that every recording on CPU has, so that it is known for ours."""
_ONE_AT_A_TIME = (
    "and CPU memory is recorded through it: two recordings cannot run at once. Stop the other one "
    "(Trainer(profiler='pytorch'), torch.profiler.profile) for these steps"
)


class RecordingLost(RuntimeError):
    """What was recorded is not there any more; the text says why."""


class Source:
    """Tells what an allocator did between `start` and `stop`.

    What is said here is said of an allocator that gives events, and no account of itself.
    """

    lists_live_blocks = False
    """Whether `live_blocks` knows every block; else only what has an owner is known of what is older."""

    clock_error_ns = 0
    """By how much the times of events may be off against `time.time_ns`."""

    workspace_bytes: Sequence[int] = ()
    """Sizes of the workspaces that libraries allocate from it once and keep."""

    follows_warmup = False
    """Whether every step of warming up is worth following, since memory runs out in the first ones if at all."""

    failure: tuple[int, int] | None = None
    """After `stop`: when the last request failed, and how many bytes it was for, if one did and the source knows."""

    overflowed = False
    """After `stop`: whether there were more events than could be kept, so that the oldest are lost."""

    snapshot: dict[str, Any] | None = None
    """After `stop`: the allocator's own account of what it did, where it gives one and it was asked for."""

    def start(self) -> None:
        """Begin the recording."""
        raise NotImplementedError

    def stop(self) -> tuple[list[Event], list[Event]]:
        """End the recording: the blocks alive when it began, and the events since.

        Raises RecordingLost where someone else has ended it before.
        """
        raise NotImplementedError

    def abort(self) -> None:
        """End the recording and forget it."""
        raise NotImplementedError

    def event_count(self) -> int:
        """How many events there are since `start`; 0 where that is known only afterwards."""
        return 0

    def reset_peak(self) -> None:
        """Have the allocator's peaks begin anew."""

    def peak_bytes(self) -> int | None:
        """The allocator's own peak since `reset_peak`, in bytes. None where it keeps none."""
        return None

    def reserved_bytes(self) -> int | None:
        """And what it held from the device at most."""
        return None

    def health(self, owned: Container[int]) -> AllocatorHealth | None:
        """How well the allocator uses what it holds; `owned` has the addresses that have an owner. None without one."""
        return None

    def live_blocks(self) -> list[Event]:
        """What is alive now, where the source can list it."""
        return []

    def address_of(self, storage: torch.UntypedStorage) -> int:
        """The address under which events tell of this storage; 0 where none does."""
        try:
            return storage.data_ptr()
        except RuntimeError:  # a tensor of zeros that is not written out, as forward-mode differentiation makes them
            return 0


def source_for(device: torch.device, max_events: int = MAX_EVENTS, *, keep_snapshot: bool = False) -> Source:
    """The source of events for `device`, which has room for `max_events`. Raises ValueError where there is none.

    With `keep_snapshot`, where the device's allocator can give an account of itself, it is kept, with Python stacks.
    """
    if device.type == "cpu":
        return CPUSource()
    if device.type == "cuda":
        return CUDASource(device, max_events, keep_snapshot=keep_snapshot)
    raise ValueError(
        f"The memory of device {str(device)!r} cannot be recorded: only 'cpu' and 'cuda' tell of their allocations. "
        "Leave the profiler out on this device."
    )


class CPUSource(Source):
    """Allocation events of `torch.profiler` on CPU."""

    # An allocation always falls between time_ns() before it and after it, as measured: `clock_error_ns` is 0.

    def __init__(self) -> None:
        self._profile: torch.autograd.profiler.profile | None = None

    def start(self) -> None:
        if torch._C._autograd._profiler_enabled():
            raise RuntimeError(f"torch.profiler is recording already, {_ONE_AT_A_TIME}.")
        # Kineto of torch 2.13 writes a line to stderr whenever a profile starts or stops, through a progress bar. It
        # reads this variable once, when the first profile of the process starts.
        quiet = "KINETO_LOG_LEVEL" not in os.environ
        if quiet:
            os.environ["KINETO_LOG_LEVEL"] = "99"
        try:
            # Not torch.profiler.profile, which is built on this: without acc_events torch 2.11's warns, and with it
            # every operation becomes a Python object at the end, which takes ten times as long as all else.
            profile = torch.autograd.profiler.profile(profile_memory=True, use_kineto=True)
            profile.__enter__()
        finally:
            if quiet:
                del os.environ["KINETO_LOG_LEVEL"]
        self._profile = profile
        with torch.autograd.profiler.record_function(_OURS):
            pass

    def stop(self) -> tuple[list[Event], list[Event]]:
        profile = self._profile
        if profile is None:
            return [], []
        self.abort()
        tree = profile.kineto_results.experimental_event_tree() if profile.kineto_results is not None else []
        # A profile that is started while another runs takes its place, and what that one had recorded is dropped.
        if not any(node.name == _OURS for node in tree):
            raise RecordingLost(f"torch.profiler was started in the recorded steps by someone else, {_ONE_AT_A_TIME}")
        return [], cpu_events(tree)

    def abort(self) -> None:
        profile, self._profile = self._profile, None
        if profile is not None and torch._C._autograd._profiler_enabled():  # else another took its place, and ended
            profile.__exit__(None, None, None)


def cpu_events(tree: list[Any]) -> list[Event]:
    """The allocations and frees in torch.profiler's event tree, in order of time."""
    events = []
    pending = list(tree)
    while pending:
        node = pending.pop()
        pending += node.children
        if node.tag.name == "Allocation":
            fields = node.extra_fields
            if fields.device.type == "cpu" and fields.ptr:
                size = fields.alloc_size
                events.append(Event(node.start_time_ns, fields.ptr, size, size))
    events.sort(key=lambda event: event.time_ns)
    return events


class CUDASource(Source):
    """The history and statistics of the CUDA caching allocator.

    Where someone else is recording the history already, it is read and left running.
    """

    lists_live_blocks = True
    follows_warmup = True
    clock_error_ns = 2_000  # the history is stamped in whole microseconds

    def __init__(self, device: torch.device, max_events: int = MAX_EVENTS, *, keep_snapshot: bool = False) -> None:
        backend = torch.cuda.memory.get_allocator_backend()
        if backend != "native":
            raise ValueError(
                f"The CUDA allocator is {backend!r}, which keeps no history of its allocations. "
                "Use the native one: leave `backend:` out of PYTORCH_CUDA_ALLOC_CONF."
            )
        self._device = torch.device("cuda", device.index if device.index is not None else torch.cuda.current_device())
        self.workspace_bytes = workspace_bytes(os.environ)
        # An allocation and its two frees are three entries, and when the history is full, the oldest are overwritten: a
        # recording stops at the end of the step in which it reaches `max_events`, so there is room for that step.
        self.max_entries = 2 * max_events
        self._segments: list[dict[str, Any]] = []
        self._events_before = 0
        self._retries_before = 0
        self._keep_snapshot = keep_snapshot
        self._started = False
        self._was_on = False
        self._since_ns = 0

    def start(self) -> None:
        self._was_on = torch._C._cuda_isHistoryEnabled()
        if not self._was_on:
            # Stacks are of use in a snapshot only, and cost microseconds an allocation.
            stacks = {"context": "alloc", "stacks": "python"} if self._keep_snapshot else {"context": None}
            torch.cuda.memory._record_memory_history("all", **stacks, max_entries=self.max_entries, clear_history=True)
        self._started = True
        # After switching on, so that nothing falls between.
        self._segments = self._snapshot_segments()
        self._since_ns = time.time_ns()
        self._events_before = self._all_events()
        self._retries_before = int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))

    def event_count(self) -> int:
        return self._all_events() - self._events_before

    def _all_events(self) -> int:
        stats = torch.cuda.memory_stats(self._device)
        return int(stats.get("allocation.all.allocated", 0) + 2 * stats.get("allocation.all.freed", 0))

    def stop(self) -> tuple[list[Event], list[Event]]:
        if not self._started:
            return [], []
        try:
            snapshot = torch.cuda.memory._snapshot()
        finally:
            self.abort()
        if self._keep_snapshot:
            self.snapshot = snapshot
        trace = snapshot["device_traces"][self._device.index]
        self.failure = last_failure(trace, self._since_ns)
        self.overflowed = len(trace) >= self.max_entries and not self._was_on
        start = parse_segments(self._segments)
        events = parse_trace(trace, self._segments, snapshot.get("allocator_settings", {}), self._since_ns)
        self._segments = []
        return start, events

    def abort(self) -> None:
        if self._started and not self._was_on:
            torch.cuda.memory._record_memory_history(None)
        self._started = False

    def reset_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> int | None:
        return int(torch.cuda.memory_stats(self._device)["allocated_bytes.all.peak"])

    def reserved_bytes(self) -> int | None:
        return int(torch.cuda.memory_stats(self._device)["reserved_bytes.all.peak"])

    def health(self, owned: Container[int]) -> AllocatorHealth | None:
        return allocator_health(
            torch.cuda.memory_stats(self._device),
            torch.cuda.mem_get_info(self._device),
            workspaces_alive(self.live_blocks(), self.workspace_bytes, owned),
            self._retries_before,
        )

    def live_blocks(self) -> list[Event]:
        return parse_segments(self._snapshot_segments())

    def _snapshot_segments(self) -> list[dict[str, Any]]:
        segments = torch.cuda.memory.memory_snapshot(include_traces=False)
        return [segment for segment in segments if segment["device"] == self._device.index]
