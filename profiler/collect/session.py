"""One stretch of recorded steps, from switching on to a recording: the part that both recorders share."""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from ..figures import AllocatorHealth
from ..files import made_path
from ..out_of_memory import observe_failed_requests
from ..recording import Recording, Window
from .buckets import NOTE as BUCKETS
from .buckets import bucket_bytes
from .modules import compiled_note
from .owners import Owners, now_ns
from .saved import UNSEEN
from .sources import Source, source_for

_OVERFLOWED = "The allocator's history was too short for the recorded steps, and its oldest part is lost."


class Session:
    """Records steps one after another. Between `open_step` and `close_step` hooks are on; else none is.

    Events come from `source`, by default from the allocator of the device.

    Values saved in two precisions are looked for in the first step: best in one that is not counted.

    `save_snapshot` is where the CUDA allocator's own account goes, as https://pytorch.org/memory_viz reads it.

    `wrapper` is what a strategy has put round the module, where it has: DistributedDataParallel, say.

    `start` and `finish` (or `abort`) must be called in the same thread.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        optimizers: Iterable[torch.optim.Optimizer],
        witnesses: Iterable[Any],
        *,
        max_events: int,
        find_duplicates: bool,
        device: torch.device | None = None,
        source: Source | None = None,
        wrapper: torch.nn.Module | None = None,
        save_snapshot: str | Path | None = None,
    ) -> None:
        self.device = device if device is not None else device_of(module)
        self._module = module
        self._wrapper = wrapper if wrapper is not None else module
        self._max_events = max_events
        self._save_snapshot = save_snapshot
        self._source: Source = (
            source
            if source is not None
            else source_for(self.device, max_events, keep_snapshot=save_snapshot is not None)
        )
        self._owners = Owners(
            module,
            optimizers,
            self.device,
            witnesses,
            max_claims=max_events,
            find_duplicates=find_duplicates,
            address_of=self._source.address_of,
        )
        self._opened_ns: int | None = None
        self._counted = True
        self._windows: list[Window] = []
        self._reserved_bytes: int | None = None
        self._health: AllocatorHealth | None = None
        self.active = False
        self.failed_request_bytes: int | None = None
        """After `fail`: what was asked for when memory ran out, where the allocator's history tells."""

    @property
    def follows_warmup(self) -> bool:
        """Whether every step of warming up is worth a session of its own."""
        return self._source.follows_warmup

    def start(self) -> None:
        if self.device.type == "cuda":
            observe_failed_requests()
        self._source.start()
        self.active = True

    def open_step(self, *, counted: bool = True) -> None:
        """A step begins. One that is not counted is followed for what it leaves alive, and for the steps after it.

        Does nothing where one is open: of data of unknown length Lightning fetches the next batch before each.
        """
        if self._opened_ns is not None:
            return
        self._source.reset_peak()
        self._opened_ns = now_ns()
        self._counted = counted
        try:
            self._owners.begin_step(counted=counted)
            self._owners.install()
        except BaseException:
            self.abort()
            raise

    def begin_phase(self, name: str) -> None:
        """The phase `name` begins now. Without this call phases are seen from what modules and autograd do."""
        if self._opened_ns is not None:
            self._owners.begin_phase(name)

    def claim_inputs(self, batch: Any) -> None:
        if self._opened_ns is not None:
            self._owners.claim_inputs(batch)

    def close_step(self) -> None:
        """The step is over. Does nothing where none is open."""
        opened_ns, self._opened_ns = self._opened_ns, None
        if opened_ns is None:
            return
        peak_bytes, reserved_bytes = self._source.peak_bytes(), self._source.reserved_bytes()
        closed_ns = now_ns()
        self._owners.end_step()
        if self._counted:
            self._windows.append(Window(opened_ns, closed_ns, peak_bytes))
            self._health = self._source.health(self._owners.addresses)
            self._reserved_bytes = max(filter(None, (self._reserved_bytes, reserved_bytes)), default=None)

    @property
    def full(self) -> bool:
        """Whether as much is kept as may be: then this step should be the last."""
        return self._owners.kept + self._source.event_count() >= self._max_events

    @property
    def counted_steps(self) -> int:
        return len(self._windows)

    def finish(self) -> Recording:
        """Switch off and give what was recorded."""
        full = self.full
        return self._recording(self._windows, self._notes(full))

    def fail(self) -> Recording:
        """Memory ran out: switch off and give what was recorded up to then. The step that failed is the one counted."""
        self._owners.claim_lasting()
        failed_ns = now_ns()
        opened_ns = self._opened_ns if self._opened_ns is not None else failed_ns
        recording = self._recording([], self._notes(False))
        if self._source.failure is not None and self._source.failure[0] + 1000 > opened_ns:  # in whole microseconds
            failed_ns, self.failed_request_bytes = self._source.failure
        recording.windows = [Window(opened_ns, failed_ns, None)]
        recording.failed_ns = failed_ns
        recording.notes.append("Memory ran out: this is what was live then, which is not the peak of a whole step.")
        return recording

    def what_is_live(self) -> Recording:
        """Instead of a recording: what is live now. Nothing needs to be on, and nothing is afterwards."""
        opened_ns = now_ns()
        self._owners.begin_step()
        start = self._source.live_blocks()
        recording = self._recording([], self._notes(False))
        recording.start, recording.phases = start, []
        recording.failed_ns = now_ns()
        recording.windows = [Window(opened_ns, recording.failed_ns, None)]
        recording.notes.append(
            "Nothing was being recorded when the memory ran out, so that only weights, gradients, masters, optimizer "
            "state and buffers have their names."
        )
        return recording

    def _recording(self, windows: list[Window], notes: list[str]) -> Recording:
        owners = self._owners
        owners.remove()
        start, events = self._source.stop()
        self.active = False
        self._opened_ns = None
        buckets = bucket_bytes(self._wrapper)
        return Recording(
            device=str(self.device),
            parameters=owners.parameter_count(),
            start=start,
            events=events,
            claims=owners.claims,
            phases=owners.phases,
            modules=owners.modules,
            gone=[] if self._source.lists_live_blocks else owners.gone,
            windows=windows,
            reserved_bytes=self._reserved_bytes,
            workspace_bytes=list(self._source.workspace_bytes),
            bucket_bytes=buckets,
            clock_error_ns=self._source.clock_error_ns,
            claims_make_blocks=not self._source.lists_live_blocks,
            forwards=owners.forwards.by_path(),
            optimizers=owners.optimizer_names(),
            health=self._health,
            own=owners.own,
            duplicates=owners.duplicates,
            notes=[
                *owners.notes,
                *notes,
                *([BUCKETS] if buckets else []),
                *([UNSEEN] if owners.saved.stood_aside else []),
                *self._write_snapshot(),
                *([_OVERFLOWED] if self._source.overflowed else []),
            ],
        )

    def _notes(self, full: bool) -> list[str]:
        compiled = compiled_note(self._module)
        notes = [] if compiled is None else [compiled]
        if full:
            steps = f"{self.counted_steps} step" + ("s" if self.counted_steps != 1 else "")
            notes.append(f"The recording ended after {steps}, when max_events={self._max_events} was reached.")
        if self._owners.dropped:
            notes.append(
                f"Of {self._owners.dropped} saved tensors and runs of modules after max_events={self._max_events} "
                "nothing was kept: their memory has no name here."
            )
        return notes

    def _write_snapshot(self) -> list[str]:
        """Write the allocator's snapshot where one is wanted; the note that says why there is none, else nothing."""
        if self._save_snapshot is None:
            return []
        snapshot, self._source.snapshot = self._source.snapshot, None
        if snapshot is None and self.device.type == "cuda":  # nothing was being recorded, which has its own note
            return []
        if snapshot is None:
            return ["save_snapshot wrote nothing: only CUDA's allocator gives an account of itself."]
        try:
            with made_path(self._save_snapshot).open("wb") as file:
                pickle.dump(snapshot, file)
        except OSError as error:  # the report is worth more
            return [f"save_snapshot wrote nothing: {error}."]
        return []

    def abort(self) -> None:
        """Switch off and forget. Does nothing where nothing is on."""
        if self.active:
            self.active = False
            self._opened_ns = None
            try:
                self._owners.remove()
            finally:
                self._source.abort()


def device_of(module: torch.nn.Module) -> torch.device:
    """Where the module's first parameter is, or its first buffer; the CPU for a module with neither."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")
