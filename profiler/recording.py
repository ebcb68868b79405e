"""What was seen while recording: pure data, no torch.

A recording is what the sources and the owners saw, in the order of one clock (nanoseconds of the Unix clock, which is
the clock of `time.time_ns`, of `torch.profiler` and of the CUDA allocator's history). It can be kept as JSON and
replayed elsewhere.
"""

import json
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from .category import Category
from .codec import decode, encode
from .figures import AllocatorHealth, Duplicate, ModuleForward

TRACE_FORMAT = "lightning-mpt-memory-trace"
TRACE_VERSION = 3
TRACE = "a trace that MemoryProfiler(save_trace=...) wrote"
TRACE_LIMIT_BYTES = 4 << 30
"""No trace is larger. What is larger is something else, and is not read into memory."""


class Event(NamedTuple):
    """One allocation (`bytes` > 0) or free (`bytes` <= 0).

    `bytes` is the block that the allocator handed out; `requested_bytes` what was asked for, at most `bytes`. Both are
    ignored in a free.
    """

    time_ns: int
    address: int
    bytes: int
    requested_bytes: int


class Claim(NamedTuple):
    """Someone owned the storage at `address` at `time_ns`: so the block alive there and then is theirs for life.

    `computed` says that autograd saw it made: then it is not what went in.
    """

    time_ns: int
    address: int
    bytes: int
    category: Category
    module: str | None
    shape: tuple[int, ...]
    dtype: str
    computed: bool = False


class Mark(NamedTuple):
    """From `time_ns` on, `name` applies, until the next mark: a phase, or the path of the running module.

    The root module's path is `""`; where no module runs, it is None. A phase that was noticed late may have begun at
    any time from `since_ns` on.
    """

    time_ns: int
    name: str | None
    since_ns: int | None = None


class Gone(NamedTuple):
    """A block older than the recording was found freed at `time_ns`, where the source does not report such frees."""

    time_ns: int
    address: int


class Interval(NamedTuple):
    """A stretch of time in which the profiler itself worked: what was allocated then is no part of training."""

    start_ns: int
    end_ns: int


class Window(NamedTuple):
    """One counted step, and the allocator's own peak within it (None where the allocator keeps none)."""

    start_ns: int
    end_ns: int
    peak_bytes: int | None


@dataclass
class Recording:
    """Everything that a report is computed from."""

    device: str
    parameters: int
    """Number of scalar parameters, tied ones once."""
    start: list[Event] = field(default_factory=list)
    """Blocks alive when the recording began."""
    events: list[Event] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    phases: list[Mark] = field(default_factory=list)
    modules: list[Mark] = field(default_factory=list)
    gone: list[Gone] = field(default_factory=list)
    windows: list[Window] = field(default_factory=list)
    reserved_bytes: int | None = None
    workspace_bytes: list[int] = field(default_factory=list)
    """Sizes of the workspaces that libraries allocate once and keep."""
    bucket_bytes: list[int] = field(default_factory=list)
    """Sizes of gradient buckets that are kept at addresses which no claim tells."""
    clock_error_ns: int = 0
    """By how much the times of events may be off against those of claims and marks."""
    claims_make_blocks: bool = False
    """True where the source cannot list what is alive (CPU): then a claim without a block stands for a block."""
    own: list[Interval] = field(default_factory=list)
    """When the profiler itself allocated. Blocks that were born and freed within one of these are left out."""
    forwards: dict[str, ModuleForward] = field(default_factory=dict)
    """By module path."""
    duplicates: list[Duplicate] = field(default_factory=list)
    optimizers: list[str] = field(default_factory=list)
    """Class names."""
    health: AllocatorHealth | None = None
    notes: list[str] = field(default_factory=list)
    failed_ns: int | None = None
    """When memory ran out, if it did: then what was live at that time is the peak, and nothing after it counts."""

    def save(self, path: str | Path) -> None:
        """Write this recording as JSON to `path`."""
        Path(path).write_text(json.dumps(self.to_json(), separators=(",", ":")), encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """The recording as `save` writes it: dictionaries, lists, strings and numbers."""
        return {"format": TRACE_FORMAT, "version": TRACE_VERSION, **encode(self)}

    @classmethod
    def load(cls, path: str | Path) -> "Recording":
        """Read what `save` wrote. Raises ValueError where the file is something else, or damaged."""
        content = read_versioned(path, TRACE_FORMAT, TRACE_VERSION, TRACE)
        try:
            for name in (field.name for field in fields(cls)):
                if name not in content:
                    raise ValueError(f"{name} is missing")
            return decode(cls, content)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; expected {TRACE}.") from error


def read_versioned(
    path: str | Path, format_name: str, version: int, what: str, limit_bytes: int = TRACE_LIMIT_BYTES
) -> dict[str, Any]:
    """The JSON object in `path`, if it says that it is a `format_name` of this `version`; else ValueError.

    A file above `limit_bytes` is refused before it is read, and a stream that gives more is read no further.
    """
    with Path(path).open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        data = file.read(limit_bytes + 1) if size <= limit_bytes else b""
    if size > limit_bytes or len(data) > limit_bytes:
        raise ValueError(
            f"{path} has {max(size, len(data)):,} bytes or more, and the limit is {limit_bytes:,}: expected {what}."
        )
    if not data.strip():
        raise ValueError(f"{path} is empty; expected {what}.")
    try:
        content = json.loads(data.decode("utf-8-sig"))
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply; expected {what}.") from error
    except ValueError as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise ValueError(f"{path} is not JSON ({error}); expected {what}.") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != format_name:
        raise ValueError(f"{path} holds {_short(found)}, not {format_name!r}; expected {what}.")
    if content.get("version") != version:
        raise ValueError(
            f"{path} has version {_short(content.get('version'))} of {format_name}, and this package reads version "
            f"{version}: read it with the version of lightning-mpt that wrote it."
        )
    return content


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else shown[:57] + "..."
