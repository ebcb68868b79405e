"""MemoryReport: what the memory was used for at the peak. Bytes only; how they look is a matter of `show/`."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .category import Category
from .codec import decode, encode
from .figures import AllocatorHealth, Duplicate, Growth, ModuleForward, PhasePeak, TensorUse, TimelinePoint
from .growth import growth_of
from .ledger import Ledger, replay
from .recording import TRACE, Recording, read_versioned

REPORT_FORMAT = "lightning-mpt-memory-report"
REPORT_VERSION = 2
REPORT_LIMIT_BYTES = 64 << 20
"""Reports are small: one of ten thousand modules has some ten MiB."""
LARGEST_TENSORS = 50
DEEPEST = 200
"""Levels of modules."""


@dataclass(frozen=True)
class MemoryReport:
    """Where the memory went in the recorded training steps.

    Attributes:
        device: the device recorded, as `torch.device` writes it.
        peak_bytes: the allocator's own peak of allocated bytes in these steps. On CPU, where the allocator keeps no
            total, the peak of what was born while recording and of what has an owner.
        reserved_bytes: what the caching allocator held from the device at its peak; None on CPU, where nothing is.
        categories: bytes of every category at the peak. They sum to `peak_bytes`, exactly.
        phases: `forward`, `backward`, `optimizer_step`: each with its own peak.
        modules: module path -> category -> the module's own bytes at the peak, its children's not included.
            `""` is the root. What has no place in a module (a gradient on its way through backward) is left out.
        tensors: the largest blocks at the peak, largest first.
        duplicates: values saved in two precisions.
        timeline: the highest moments, in order of time; what is live at one stays about until the next.
        parameters: number of scalar parameters, tied ones once.
        steps: how many steps were counted.
        forwards: module path -> its forward passes: calls, time, size of the outputs.
        activation_dtypes: module path -> dtype -> bytes of the module's own activations at the peak.
        optimizers: the class names of the optimizers that trained.
        health: how well the caching allocator used what it holds; None on CPU.
        out_of_memory: whether this is of the moment at which memory ran out, and not of whole steps: the peak is that
            moment.
        failed_request_bytes: how much was asked for then and not there. None of whole steps, and where the size is not
            known.
        growth: by how much memory grew from step to step, where it did; seen in three counted steps or more.
        notes: what a reader must know to trust the figures: a bound that was reached, modules that could not be told
            apart. One sentence each.
    """

    device: str
    peak_bytes: int
    reserved_bytes: int | None
    categories: Mapping[Category, int]
    phases: Mapping[str, PhasePeak]
    modules: Mapping[str, Mapping[Category, int]]
    tensors: tuple[TensorUse, ...]
    duplicates: tuple[Duplicate, ...]
    timeline: tuple[TimelinePoint, ...]
    parameters: int
    steps: int
    forwards: Mapping[str, ModuleForward] = field(default_factory=dict)
    activation_dtypes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    optimizers: tuple[str, ...] = ()
    health: AllocatorHealth | None = None
    out_of_memory: bool = False
    failed_request_bytes: int | None = None
    growth: Growth | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def from_recording(cls, recording: Recording) -> "MemoryReport":
        """Replay a recording into a report. Where memory ran out, the peak is that moment."""
        ledger = replay(recording)
        own_peaks = [window.peak_bytes for window in recording.windows if window.peak_bytes is not None]
        peak_bytes = max(own_peaks) if own_peaks else ledger.peak.bytes
        categories = {category: ledger.peak.categories.get(category, 0) for category in Category}
        # Where the replay and the allocator differ, the allocator is right, and the difference has no name.
        categories[Category.UNATTRIBUTED] += peak_bytes - ledger.peak.bytes
        began_ns = min((window.start_ns for window in recording.windows), default=0)
        return cls(
            device=recording.device,
            peak_bytes=peak_bytes,
            reserved_bytes=recording.reserved_bytes,
            categories=categories,
            phases={name: PhasePeak(peak.bytes, dict(peak.categories)) for name, peak in ledger.phases.items()},
            modules=_modules(ledger),
            tensors=_largest(ledger),
            duplicates=tuple(recording.duplicates),
            timeline=tuple(
                TimelinePoint(at.time_ns - began_ns, at.phase, sum(at.categories.values()), at.categories)
                for at in ledger.timeline
            ),
            parameters=recording.parameters,
            steps=len(recording.windows),
            forwards=dict(sorted(recording.forwards.items())),
            activation_dtypes=_activation_dtypes(ledger),
            optimizers=tuple(recording.optimizers),
            health=recording.health,
            out_of_memory=recording.failed_ns is not None,
            growth=growth_of(ledger.blocks, recording.windows),
            notes=tuple(recording.notes),
        )

    @classmethod
    def from_trace(cls, path: str | Path) -> "MemoryReport":
        """Replay the events that `save_trace=path` kept. Raises ValueError where `path` holds something else."""
        recording = Recording.load(path)
        try:
            report = cls.from_recording(recording)
            _check(report)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; expected {TRACE}.") from error
        return report

    def save(self, path: str | Path) -> None:
        """Write the report as JSON to `path`."""
        Path(path).write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    def to_json(self) -> dict[str, Any]:
        """The report as `save` writes it: dictionaries, lists, strings and numbers."""
        return {"format": REPORT_FORMAT, "version": REPORT_VERSION, **encode(self)}

    @classmethod
    def load(cls, path: str | Path) -> "MemoryReport":
        """Read what `save` wrote. Raises ValueError where `path` holds something else, or another version of it."""
        what = "a report that MemoryReport.save wrote"
        content = read_versioned(path, REPORT_FORMAT, REPORT_VERSION, what, REPORT_LIMIT_BYTES)
        # Reports were once without this field: then the size of the request said that memory had run out.
        content.setdefault("out_of_memory", content.get("failed_request_bytes") is not None)
        try:
            report = decode(cls, content)
            _check(report)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; expected {what}.") from error
        return report

    def print(self, *, full: bool = False) -> None:
        """Print the tables to the terminal; with `full` the largest tensors, duplicates and more of the rest."""
        from .show.render import print_report

        print_report(self, full=full)

    def compare(self, *others: "MemoryReport", names: Iterable[str] = ()) -> "Comparison":
        """This report as the base, beside `others`: what they save against it."""
        return Comparison((self, *others), tuple(names))


@dataclass(frozen=True)
class Comparison:
    """Reports side by side; the first is the base that the others are measured by."""

    reports: tuple[MemoryReport, ...]
    names: tuple[str, ...] = ()

    @property
    def saved_bytes(self) -> tuple[int, ...]:
        """The base's peak less each other's."""
        return tuple(self.reports[0].peak_bytes - report.peak_bytes for report in self.reports[1:])

    @property
    def peak_ratios(self) -> tuple[float, ...]:
        """Each other's peak by the base's."""
        return tuple(report.peak_bytes / self.reports[0].peak_bytes for report in self.reports[1:])

    def print(self) -> None:
        """Print them side by side to the terminal."""
        from .show.render import print_comparison

        print_comparison(self)


def _check(report: MemoryReport) -> None:
    """Raise ValueError where the figures, each of the right type, make no sense."""
    for name in ("peak_bytes", "parameters", "steps", "failed_request_bytes"):
        if (value := getattr(report, name) or 0) < 0:
            raise ValueError(f"{name} is {value}, not 0 or more")
    for paths in (report.modules, report.forwards, report.activation_dtypes):
        if deep := next((path for path in paths if path.count(".") > DEEPEST), None):
            raise ValueError(f"the module {deep[:40]!r}... is more than {DEEPEST} levels deep")


def _modules(ledger: Ledger) -> dict[str, dict[Category, int]]:
    modules: dict[str, dict[Category, int]] = {}
    for block in ledger.live_at_peak():
        if block.module is not None:
            own = modules.setdefault(block.module, {})
            own[block.category] = own.get(block.category, 0) + block.requested_bytes
    return dict(sorted(modules.items()))


def _activation_dtypes(ledger: Ledger) -> dict[str, dict[str, int]]:
    modules: dict[str, dict[str, int]] = {}
    for block in ledger.live_at_peak():
        if block.category is Category.ACTIVATIONS and block.module is not None and block.claim is not None:
            own = modules.setdefault(block.module, {})
            own[block.claim.dtype] = own.get(block.claim.dtype, 0) + block.requested_bytes
    return dict(sorted(modules.items()))


def _largest(ledger: Ledger) -> tuple[TensorUse, ...]:
    blocks = sorted(ledger.live_at_peak(), key=lambda block: -block.requested_bytes)[:LARGEST_TENSORS]
    return tuple(
        TensorUse(
            block.requested_bytes,
            block.category,
            block.module,
            block.claim.shape if block.claim is not None else None,
            block.claim.dtype if block.claim is not None else None,
            ledger.phase_of_birth(block),
        )
        for block in blocks
    )
