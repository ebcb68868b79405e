"""How a report looks in a terminal: which tables, in which order. It measures nothing."""

from collections.abc import Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..category import Category
from ..report import Comparison, MemoryReport
from .advisor import advise
from .tables import (
    STYLES,
    ByWidth,
    advice_table,
    apart,
    blank_or_bytes,
    category_table,
    duplicates_line,
    duplicates_table,
    health_table,
    module_table,
    new_table,
    notes_text,
    phase_table,
    portions,
    tensor_table,
)
from .words import count_of, format_bytes, format_saving, printable

_SHORT_MODULES, _MODULES = 6, 14
_TENSORS = _DUPLICATES = 10
_SHORT_ADVICE, _ADVICE = 3, 5


def render_report(report: MemoryReport, *, full: bool = False) -> RenderableType:
    """Categories at the peak, phases, modules, notes and advice; with `full` tensors, and more of the rest."""
    parts: list[RenderableType | None] = [heading(report), category_table(report)]
    if report.phases:
        parts.append(phase_table(report))
    parts.append(module_table(report, _MODULES if full else _SHORT_MODULES))
    if full:
        parts += [tensor_table(report, _TENSORS), duplicates_table(report.duplicates, _DUPLICATES)]
        if report.health is not None:
            parts.append(health_table(report.health))
    else:
        parts.append(duplicates_line(report.duplicates))
    parts.append(notes_text(report.notes))
    parts.append(advice_table(advise(report), _ADVICE if full else _SHORT_ADVICE))
    return apart(part for part in parts if part is not None)


def render_comparison(comparison: Comparison) -> RenderableType:
    """Reports side by side, and what each saves against the first: in all, and of every category.

    Where they do not fit beside each other, there are several tables, each with the first report in it.
    """

    def make(width: int) -> RenderableType:
        base, *others = comparison_names(comparison)
        columns = (width - _NAME_WIDTH - _SIZE_WIDTH) // (_SIZE_WIDTH + _SAVED_WIDTH)
        beside = list(zip(others, comparison.reports[1:], strict=True))
        tables = [_side_by_side((base, comparison.reports[0]), some) for some in portions(beside, columns) or [()]]
        return Group(Text("Memory at the peak", "bold"), apart(tables))

    return ByWidth(make)


_NAME_WIDTH, _SIZE_WIDTH, _SAVED_WIDTH = 16, 12, 9


def _side_by_side(base: tuple[str, MemoryReport], others: Sequence[tuple[str, MemoryReport]]) -> Table:
    """Of a report by its name, and of others by theirs."""
    reports = [report for _, report in (base, *others)]
    headings = [base[0]]
    for name, _ in others:
        headings += [name, "saved"]
    table = new_table("category", *headings)
    for category in Category:
        sizes = [report.categories.get(category, 0) for report in reports]
        if any(sizes):
            table.add_row(category.value, *_with_savings(sizes, reports[0].peak_bytes), style=STYLES.get(category))
    table.add_section()
    peaks = [report.peak_bytes for report in reports]
    table.add_row("peak", *_with_savings(peaks, peaks[0], "green"), style="bold")
    return table


def _with_savings(sizes: list[int], peak_bytes: int, style: str = "") -> list[Text]:
    """The base's size; then of each other the size, and what it saves of the base's peak: so a column adds up."""
    cells = [Text(blank_or_bytes(sizes[0]))]
    for size in sizes[1:]:
        saved = format_saving(sizes[0], size, peak_bytes)
        cells += [Text(blank_or_bytes(size)), Text(saved, style if sizes[0] >= size else "red")]
    return cells


def comparison_names(comparison: Comparison) -> list[str]:
    """A name for every report: those given, and numbers for the rest."""
    count = len(comparison.reports)
    numbered = [f"report {i + 1}" for i in range(len(comparison.names), count)]
    return [printable(name) for name in (*comparison.names, *numbered)][:count]


def print_report(report: MemoryReport, console: Console | None = None, *, full: bool = False) -> None:
    (console or Console()).print(render_report(report, full=full))


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    (console or Console()).print(render_comparison(comparison))


def report_text(report: MemoryReport, width: int = 100, *, full: bool = False) -> str:
    """The report as plain text, `width` columns wide."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render_report(report, full=full))
    return capture.get()


def heading(report: MemoryReport) -> Text:
    """What the figures are of."""
    text = Text.assemble(("Memory at the peak", "bold"), f" on {printable(report.device)}")
    text.append(f", {count_of(report.steps, 'step')} recorded")
    if report.reserved_bytes is not None:
        text.append(f", {format_bytes(report.reserved_bytes)} reserved")
    if report.optimizers:
        text.append(f", {', '.join(map(printable, report.optimizers))}")
    return text
