"""Where the memory of a training step goes: every byte that the allocator holds at the peak, by name."""

from typing import TYPE_CHECKING, Any

from .category import Category
from .figures import AllocatorHealth, Duplicate, Growth, ModuleForward, PhasePeak, TensorUse, TimelinePoint
from .recorder import MemoryRecorder
from .report import Comparison, MemoryReport

if TYPE_CHECKING:
    from .lightning import MemoryProfiler

__all__ = [
    "AllocatorHealth",
    "Category",
    "Comparison",
    "Duplicate",
    "Growth",
    "MemoryProfiler",
    "MemoryRecorder",
    "MemoryReport",
    "ModuleForward",
    "PhasePeak",
    "TensorUse",
    "TimelinePoint",
]


def __getattr__(name: str) -> Any:
    # Lightning takes a second and more to import; the recorder and the reports do without it.
    if name == "MemoryProfiler":
        from .lightning import MemoryProfiler

        return MemoryProfiler
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
