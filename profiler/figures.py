"""What a report is made of: frozen figures, bytes and nanoseconds only."""

from collections.abc import Mapping
from dataclasses import dataclass

from .category import Category


@dataclass(frozen=True)
class PhasePeak:
    """The highest moment of one phase. `categories` sums to `peak_bytes`."""

    peak_bytes: int
    categories: Mapping[Category, int]


@dataclass(frozen=True)
class TensorUse:
    """A block that was alive at the peak. `shape` and `dtype` are None where no owner told of them.

    `phase` is the phase in which it was born; None for a block that is older than the recording.
    """

    bytes: int
    category: Category
    module: str | None
    shape: tuple[int, ...] | None
    dtype: str | None
    phase: str | None = None


@dataclass(frozen=True)
class Duplicate:
    """Values that `module` keeps in two precisions; `bytes` is the size of the smaller copy."""

    module: str
    shape: tuple[int, ...]
    dtypes: tuple[str, str]
    bytes: int


@dataclass(frozen=True)
class TimelinePoint:
    """What was live `time_ns` after the first counted step began. `categories` sums to `bytes`."""

    time_ns: int
    phase: str
    bytes: int
    categories: Mapping[Category, int]


@dataclass(frozen=True)
class ModuleForward:
    """A module's forward passes in the counted steps: how many, the time they took and the size of what they gave.

    `time_ns` is that of all calls, the module's children included, as the host saw it (on CUDA: to launch).
    `output_bytes` is the size of one call's outputs, as large as they came.
    """

    calls: int
    time_ns: int
    output_bytes: int


@dataclass(frozen=True)
class Growth:
    """What is live at the end of a step was more after each of the counted steps than after the one before.

    `step_bytes` is by how much at least. `categories` and `modules` say what there is at the end of the last step that
    the steps before it made: activations, inputs, and what has no owner, which all belong to one step.
    """

    step_bytes: int
    categories: Mapping[Category, int]
    modules: Mapping[str, int]


@dataclass(frozen=True)
class AllocatorHealth:
    """How well the CUDA caching allocator used what it holds. All in bytes, at the end of the counted steps.

    `fragmented_bytes`: held from the device but in no live block, at the peak of what is held. `workspace_bytes`: of
    libraries (cuBLAS), which torch allocates once and never frees. `outside_bytes`: used on the device by this and
    other processes, and not the allocator's: the CUDA context, NCCL, other programs. `retries`: how often the
    allocator had to give memory back and ask again.
    """

    reserved_bytes: int
    fragmented_bytes: int
    workspace_bytes: int
    outside_bytes: int
    total_bytes: int
    """Of the device."""
    retries: int
