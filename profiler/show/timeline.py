"""The timeline of a report as stretches of one phase, for those who draw it."""

from typing import NamedTuple

from ..category import Category
from ..report import MemoryReport


class Span(NamedTuple):
    """A stretch of time in one phase, from its first point to the first of the next."""

    phase: str
    start_ns: int
    end_ns: int
    highest_bytes: int


def phase_spans(report: MemoryReport) -> list[Span]:
    """The stretches in order of time; the last ends at the last point."""
    spans: list[Span] = []
    for point in report.timeline:
        if spans and spans[-1].phase == point.phase:
            spans[-1] = spans[-1]._replace(
                end_ns=point.time_ns, highest_bytes=max(spans[-1].highest_bytes, point.bytes)
            )
        else:
            if spans:
                spans[-1] = spans[-1]._replace(end_ns=point.time_ns)
            spans.append(Span(point.phase, point.time_ns, point.time_ns, point.bytes))
    return spans


def last_phase(report: MemoryReport) -> str:
    """The phase in which the recording ended: that in which memory ran out, if it did. "" where none is known."""
    return report.timeline[-1].phase if report.timeline else ""


def used_categories(*reports: MemoryReport) -> list[Category]:
    """The categories that have bytes at the peak or in the timeline of any of the reports, in the order of STACKED."""
    return [
        category
        for category in STACKED
        if any(
            report.categories.get(category) or any(point.categories.get(category) for point in report.timeline)
            for report in reports
        )
    ]


STACKED = (
    Category.WEIGHTS,
    Category.MASTER_WEIGHTS,
    Category.OPTIMIZER_STATE,
    Category.BUFFERS,
    Category.GRADIENTS,
    Category.INPUTS,
    Category.ACTIVATIONS,
    Category.TEMPORARIES,
    Category.ROUNDING,
    Category.UNATTRIBUTED,
)
"""From the bottom: what stays lies under what comes and goes, so that its edges are straight."""

COLORS: dict[Category, str] = {
    Category.WEIGHTS: "#4c78a8",
    Category.MASTER_WEIGHTS: "#86b1d8",
    Category.GRADIENTS: "#e0894a",
    Category.OPTIMIZER_STATE: "#7a6bb0",
    Category.ACTIVATIONS: "#54a07a",
    Category.BUFFERS: "#b8a04c",
    Category.INPUTS: "#c98bb0",
    Category.TEMPORARIES: "#c75d5d",
    Category.ROUNDING: "#b3b3b3",
    Category.UNATTRIBUTED: "#7f7f7f",
}
"""One color for a category, wherever it is drawn: readable on white and on near black."""
