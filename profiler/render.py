"""How a report looks: rich tables. The only place that knows GiB; it measures nothing."""

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .category import Category
from .report import Comparison, MemoryReport
from .words import format_bytes, format_share

_PER_PARAMETER = (Category.WEIGHTS, Category.MASTER_WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
"""What grows with the number of parameters, so that bytes per parameter say something."""
_STYLES = {Category.UNATTRIBUTED: "yellow", Category.ROUNDING: "dim"}


def render_report(report: MemoryReport) -> RenderableType:
    """The whole report: categories at the peak, and the peak of every phase."""
    parts: list[RenderableType] = [_heading(report), _category_table(report)]
    if report.phases:
        parts.append(_phase_table(report))
    return Group(*parts)


def render_comparison(comparison: Comparison) -> RenderableType:
    """Reports side by side, and what each saves against the first."""
    reports = comparison.reports
    names = [*comparison.names, *(f"report {i + 1}" for i in range(len(comparison.names), len(reports)))]
    table = Table(title="Memory at the peak", title_justify="left", title_style="bold")
    table.add_column("category", no_wrap=True)
    for name in names[: len(reports)]:
        table.add_column(name, justify="right", overflow="fold")
    for category in Category:
        sizes = [report.categories.get(category, 0) for report in reports]
        if any(sizes):
            table.add_row(category.value, *map(_format_or_blank, sizes), style=_STYLES.get(category))
    table.add_section()
    table.add_row("peak", *(format_bytes(report.peak_bytes) for report in reports), style="bold")
    base = reports[0].peak_bytes
    if base:
        savings = ["", *(f"{(base - report.peak_bytes) / base:.1%}" for report in reports[1:])]
        table.add_row("saved", *savings, style="bold green")
    return table


def print_report(report: MemoryReport, console: Console | None = None) -> None:
    (console or Console()).print(render_report(report))


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    (console or Console()).print(render_comparison(comparison))


def report_text(report: MemoryReport, width: int = 100) -> str:
    """The report as plain text, `width` columns wide."""
    console = Console(width=width, color_system=None, force_terminal=False)
    with console.capture() as capture:
        console.print(render_report(report))
    return capture.get()


def _heading(report: MemoryReport) -> Text:
    steps = f"{report.steps} step" + ("s" if report.steps != 1 else "")
    text = Text.assemble(("Memory at the peak", "bold"), f" on {report.device}, {steps} recorded")
    if report.reserved_bytes is not None:
        text.append(f", {format_bytes(report.reserved_bytes)} reserved")
    return text


def _category_table(report: MemoryReport) -> Table:
    table = _table("category", "memory", "share", "bytes per parameter")
    model = 0
    for category in Category:
        size = report.categories.get(category, 0)
        per_parameter = ""
        if category in _PER_PARAMETER:
            model += size
            per_parameter = _per_parameter(size, report)
        if size:
            cells = (category.value, format_bytes(size), format_share(size, report.peak_bytes), per_parameter)
            table.add_row(*cells, style=_STYLES.get(category))
    table.add_section()
    table.add_row(
        "peak", format_bytes(report.peak_bytes), format_share(report.peak_bytes, report.peak_bytes), "", style="bold"
    )
    if report.parameters:
        cells = (
            "model state of it",
            format_bytes(model),
            format_share(model, report.peak_bytes),
            _per_parameter(model, report),
        )
        table.add_row(*cells, style="dim")
    return table


def _phase_table(report: MemoryReport) -> Table:
    table = _table("phase peaks", *(name.replace("_", " ") for name in report.phases))
    phases = report.phases.values()
    for category in Category:
        sizes = [phase.categories.get(category, 0) for phase in phases]
        if any(sizes):
            table.add_row(category.value, *map(_format_or_blank, sizes), style=_STYLES.get(category))
    table.add_section()
    table.add_row("peak", *(format_bytes(phase.peak_bytes) for phase in phases), style="bold")
    return table


def _table(first: str, *rest: str) -> Table:
    table = Table()
    table.add_column(first, no_wrap=True)
    for heading in rest:
        table.add_column(heading, justify="right", min_width=9)
    return table


def _format_or_blank(size: int) -> str:
    return format_bytes(size) if size else ""


def _per_parameter(size: int, report: MemoryReport) -> str:
    return f"{size / report.parameters:.2f}" if report.parameters else ""
