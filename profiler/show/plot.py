"""A report's timeline as a picture: stacked areas of the categories over time. Needs matplotlib (the extra `plots`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import MemoryReport
from .timeline import COLORS, phase_spans, used_categories
from .words import format_bytes, in_words, printable, spoken, unit_of

_INK, _FAINT = "#333333", "#d9d9d9"


def write_plot(reports: Sequence[MemoryReport], names: Sequence[str], path: str | Path) -> None:
    """Draw the reports below each other, on one scale of bytes, into `path`: .png, .svg or .pdf.

    Raises:
        ModuleNotFoundError: without matplotlib, with the extra that brings it.
        ValueError: for a kind of picture that matplotlib cannot write.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            "a plot needs matplotlib, which is not installed: pip install 'lightning-mpt[plots]'", name=missing.name
        ) from missing

    figure = Figure(figsize=(9.6, 0.9 + 3.0 * len(reports)), dpi=150, layout="constrained")
    panels: list[Any] = list(figure.subplots(len(reports), 1, sharey=True, squeeze=False)[:, 0])
    highest = max((point.bytes for report in reports for point in report.timeline), default=0)
    categories = used_categories(*reports)
    for axes, report, name in zip(panels, reports, names, strict=True):
        _draw(axes, report, name, categories, *unit_of(highest))
    panels[-1].set_xlabel("ms from the beginning of the first counted step", color=_INK, fontsize=9)
    panels[0].set_ylim(0, max(highest / unit_of(highest)[0] * 1.18, 1e-9))
    handles, labels = panels[0].get_legend_handles_labels()
    if handles:
        # Reversed: the legend from top to bottom as the areas lie.
        figure.legend(
            handles[::-1], labels[::-1], loc="outside right upper", frameon=False, fontsize=9, labelcolor=_INK
        )
    figure.savefig(path, facecolor="white", format=Path(path).suffix[1:] or "png")


def _draw(axes: Any, report: MemoryReport, name: str, categories: list[Any], unit: int, unit_name: str) -> None:
    times = [point.time_ns / 1e6 for point in report.timeline]
    title = f"{printable(name)}: {format_bytes(report.peak_bytes)} at the peak, on {printable(report.device)}"
    axes.set_title(title, loc="left", fontsize=11, color=_INK, pad=18, parse_math=False)
    areas = [[point.categories.get(category, 0) / unit for point in report.timeline] for category in categories]
    if times:
        axes.stackplot(
            times,
            areas,
            labels=[in_words(category) for category in categories],
            colors=[COLORS[category] for category in categories],
            linewidth=0,
            step="post",  # what is live stays until the next event
        )
        axes.set_xlim(times[0], max(times[-1], times[0] + 1e-6))
        _mark_phases(axes, report)
        peak = max(report.timeline, key=lambda point: point.bytes)
        axes.plot([peak.time_ns / 1e6], [peak.bytes / unit], "o", color=_INK, markersize=4, clip_on=False)
    else:
        axes.text(0.5, 0.5, "no timeline", transform=axes.transAxes, ha="center", color=_INK)
    axes.set_ylabel(unit_name, color=_INK)
    axes.set_axisbelow(False)
    axes.grid(axis="y", color="white", alpha=0.35, linewidth=0.8)
    axes.tick_params(colors=_INK, length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_FAINT)


def _mark_phases(axes: Any, report: MemoryReport) -> None:
    """A line where a phase begins, and its name above where there is room for it."""
    spans = phase_spans(report)
    whole = max(spans[-1].end_ns - spans[0].start_ns, 1)
    for span in spans:
        axes.axvline(span.start_ns / 1e6, color=_INK, alpha=0.35, linewidth=0.7, linestyle=(0, (2, 2)))
        label = spoken(span.phase)
        if (span.end_ns - span.start_ns) / whole > 0.0095 * len(label):
            middle = (span.start_ns + span.end_ns) / 2e6
            axes.text(
                middle,
                1.02,
                label,
                transform=axes.get_xaxis_transform(),
                ha="center",
                fontsize=8.5,
                color=_INK,
                parse_math=False,
            )
