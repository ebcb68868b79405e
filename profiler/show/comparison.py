"""How the rows of `compare` look: categories by precision, as many columns in a table as fit, and the usual claims."""

from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from ..category import Category
from ..compare.run import Row, base_of
from .claims import FP32, Claim, left_out, saved_claims, share_claims
from .tables import STYLES, blank_or_bytes, portions
from .words import format_bytes

_COLUMN = 13
"""Columns of text that a precision takes: its figure, the space on both sides, a line."""
_LABELS = 20
"""And those of the categories' names, with the table's outer lines: five more than the longest of them."""


More = Mapping[str, Mapping[str, int | str | None]]
"""Further lines of the table: label -> precision -> a number of bytes, or what is said as it is."""


def print_rows(
    rows: Sequence[Row],
    title: str,
    console: Console | None = None,
    *,
    remarks: Sequence[str] = (),
    more: More | None = None,
) -> None:
    """Print the comparison, with further lines at its end, and the remarks below its tables."""
    console = console or Console()
    console.print(render_rows(rows, title, console.width, remarks, more))


def render_rows(
    rows: Sequence[Row], title: str, width: int, remarks: Sequence[str] = (), more: More | None = None
) -> RenderableType:
    """The comparison for `width` columns: tables of as many precisions as fit, why others failed, and the claims."""
    parts: list[RenderableType] = [Text(title, style="bold")]
    base = base_of(rows)
    labels = max([_LABELS, *(len(label) + 5 for label in more or {})])
    categories = [c for c in Category if any(r.report is not None and r.report.categories.get(c) for r in rows)]
    narrow = width < labels + len(rows) * 25
    beside = portions(rows, (width - labels) // _COLUMN)
    parts += [_table(some, categories, base, narrow, more or {}) for some in beside]
    for row in rows:
        if row.error:
            parts.append(Text.assemble((row.precision, "bold yellow"), f" {row.status}: {row.error}"))
    notes = {note: None for row in rows if row.report is not None for note in row.report.notes}
    parts += [Text(_whose(rows, note) + note, style="dim") for note in notes]
    parts += [Text(remark, style="dim") for remark in remarks]
    parts += _claims(rows)
    return Group(*parts)


def _table(rows: Sequence[Row], categories: Sequence[Category], base: Row | None, narrow: bool, more: More) -> Table:
    table = Table()
    table.add_column("category", no_wrap=True)
    for row in rows:
        table.add_column(_heading(row.precision, narrow), justify="right", min_width=9)
    for category in categories:
        cells = [row.report.categories.get(category, 0) if row.report is not None else 0 for row in rows]
        table.add_row(category.value, *map(blank_or_bytes, cells), style=STYLES.get(category))
    table.add_section()
    table.add_row("peak", *map(_peak, rows), style="bold")
    if base is not None:
        saved = [_saved(row, base) for row in rows]
        table.add_row("saved", *(cell[0] for cell in saved))
        table.add_row("  of the peak", *(cell[1] for cell in saved))
    if any(row.step_seconds for row in rows):
        table.add_section()
        table.add_row("time of a step", *map(_seconds, rows), style="dim")
    if more:
        table.add_section()
    for label, by_precision in more.items():
        table.add_row(label, *(_cell(by_precision.get(row.precision)) for row in rows))
    return table


def _heading(precision: str, narrow: bool) -> str:
    """`mpt-bf16-true:compact`, on three lines where there is little room."""
    return precision.replace("mpt-", "mpt-\n").replace(":", "\n:") if narrow else precision


def _peak(row: Row) -> Text:
    if row.report is None:
        return Text(row.status, style="yellow")
    return Text(format_bytes(row.report.peak_bytes))


def _saved(row: Row, base: Row) -> tuple[Text, Text]:
    """What is saved against the base, in bytes and as a share; blank for the base itself."""
    if row.report is None or base.report is None or row is base:
        return Text(""), Text("")
    saved = base.report.peak_bytes - row.report.peak_bytes
    style = "bold green" if saved > 0 else "bold red" if saved < 0 else ""
    share = f"{saved / base.report.peak_bytes:.1%}" if base.report.peak_bytes else ""
    return Text(format_bytes(saved), style=style), Text(share, style=style)


def _cell(value: int | str | None) -> str:
    return value if isinstance(value, str) else "" if value is None else format_bytes(value)


def _seconds(row: Row) -> str:
    if row.step_seconds is None:
        return ""
    return f"{row.step_seconds:.2f} s" if row.step_seconds >= 1 else f"{row.step_seconds * 1000:.1f} ms"


def _whose(rows: Sequence[Row], note: str) -> str:
    """The precisions that a note is about, unless it is about all."""
    reports = {row.precision: row.report for row in rows if row.report is not None}
    whose = [precision for precision, report in reports.items() if note in report.notes]
    return f"{', '.join(whose)}: " if len(whose) < len(reports) or len(reports) == 1 else ""


def _claims(rows: Sequence[Row]) -> list[RenderableType]:
    """The paragraph on what is usually said, where FP32 is among the rows."""
    fp32 = next((row.report for row in rows if row.precision == FP32 and row.report is not None), None)
    if fp32 is None:
        return []
    lines = [_claim(claim, claim.about, f"{claim.share:.1%} of the FP32 peak") for claim in share_claims(fp32)]
    rest = left_out(fp32)
    if rest is not None:
        lines.append(Text.assemble("- ", (rest[0], "bold"), f" {rest[1]:.1%}, which the usual figures leave out"))
    for row in rows:
        for claim in saved_claims(fp32, row.report) if row.report is not None and row.report is not fp32 else ():
            lines.append(_claim(claim, f"saved by {row.precision}", f"{claim.share:.1%}"))
    return [Text("\nWhat is usually said of FP32 training, for this network", style="bold"), *lines]


def _claim(claim: Claim, about: str, measured: str) -> Text:
    mark, style = ("✓", "green") if claim.holds else ("✗", "yellow")
    said = f"{claim.low:.0%} to {claim.high:.0%}"
    text = Text.assemble((f"{mark} ", style), (about, "bold"), f" {measured}; usually said: {said}")
    if claim.why:
        text.append(f". Here {claim.why}")
    return text
