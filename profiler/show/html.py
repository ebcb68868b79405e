"""A report, or several side by side, as one HTML file that needs nothing else and opens without a network.

Whatever comes from a report goes through `_text` on its way into the page: names of modules are others' words.
"""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from ..category import MODEL_STATE, Category
from ..report import MemoryReport
from .advisor import advise
from .page import page
from .svg import timeline_svg
from .tables import blank_or_bytes
from .timeline import COLORS, STACKED
from .tree import Node, module_tree, top_level
from .words import count_of, format_bytes, format_saving, format_shape, format_share, in_words, printable, spoken

_TENSORS, _DUPLICATES, _ADVICE = 20, 20, 8
_LEAST_SHARE = 0.001
"""Of the peak: modules with less are left out."""


def write_html(reports: Sequence[MemoryReport], names: Sequence[str], path: str | Path) -> None:
    """Write the reports to `path`; the first is the base that the others are measured by."""
    Path(path).write_text(render_html(reports, names), encoding="utf-8")


def render_html(reports: Sequence[MemoryReport], names: Sequence[str]) -> str:
    """The page as text."""
    highest = max((point.bytes for report in reports for point in report.timeline), default=0)
    highest_phase = max((phase.peak_bytes for report in reports for phase in report.phases.values()), default=0)
    parts = ["<h1>Where the memory went</h1>"]
    if len(reports) > 1:
        parts.append(f'<section class="card compare"><h2>Side by side</h2>{_comparison(reports, names)}</section>')
    articles = (_report(report, name, highest, highest_phase) for report, name in zip(reports, names, strict=True))
    parts.append(f'<div class="reports">{"".join(articles)}</div>')
    kind = ' class="alone"' if len(reports) == 1 else ""
    return page(f"Memory: {', '.join(map(printable, names))}", f"<main{kind}>{''.join(parts)}</main>")


def _text(value: object) -> str:
    """`value` as text within the page, in an attribute too."""
    return escape(printable(str(value)))


class _Column(NamedTuple):
    """A heading, and the classes of its cells: `n` a number, `whole` unbroken, `wide` left out where it is narrow."""

    heading: str
    kind: str = ""


def _table(columns: Iterable[_Column], rows: Iterable[str]) -> str:
    head = "".join(f"<th{_class(column)}>{_text(column.heading)}</th>" for column in columns)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _row(columns: Sequence[_Column], cells: Sequence[str], kind: str = "") -> str:
    """Cells are HTML."""
    inside = "".join(f"<td{_class(column)}>{cell}</td>" for column, cell in zip(columns, cells, strict=True))
    return f'<tr class="{kind}">{inside}</tr>' if kind else f"<tr>{inside}</tr>"


def _class(column: _Column) -> str:
    return f' class="{column.kind}"' if column.kind else ""


def _key(category: Category) -> str:
    return _swatch(category) + in_words(category)


def _swatch(category: Category) -> str:
    return f'<span class="key" style="background:{COLORS[category]}" title="{in_words(category)}"></span>'


def _bar(categories: Mapping[Category, int], whole: int) -> str:
    """A bar that is full at `whole` bytes."""
    pieces = []
    for category in STACKED:
        size = categories.get(category, 0)
        if size > 0 and whole > 0:
            title = f"{in_words(category)} {format_bytes(size)}"
            style = f"width:{min(100 * size / whole, 100):.3f}%;background:{COLORS[category]}"
            pieces.append(f'<i style="{style}" title="{title}"></i>')
    return f'<div class="bar">{"".join(pieces)}</div>'


def _comparison(reports: Sequence[MemoryReport], names: Sequence[str]) -> str:
    base = reports[0].peak_bytes
    columns = [_Column("category"), _Column(names[0], "n")]
    for name in names[1:]:
        columns += [_Column(name, "n"), _Column("saved", "n")]

    def cells(sizes: Sequence[int]) -> list[str]:
        row = [blank_or_bytes(sizes[0])]
        for size in sizes[1:]:
            saved = format_saving(sizes[0], size, base)
            kind = "good" if size <= sizes[0] else "bad"
            row += [blank_or_bytes(size), saved and f'<span class="{kind}">{saved}</span>']
        return row

    rows = []
    for category in Category:
        sizes = [report.categories.get(category, 0) for report in reports]
        if any(sizes):
            rows.append(_row(columns, [_key(category), *cells(sizes)]))
    rows.append(_row(columns, ["peak", *cells([report.peak_bytes for report in reports])], "sum"))
    note = '<p class="soft">Savings are shares of the peak of the first, so that a column adds up.</p>'
    return _table(columns, rows) + note


def _report(report: MemoryReport, name: str, highest: int, highest_phase: int) -> str:
    told = [report.device, f"{count_of(report.steps, 'step')} recorded", f"{report.parameters:,} parameters"]
    if report.reserved_bytes is not None:
        told.append(f"{format_bytes(report.reserved_bytes)} reserved")
    told += report.optimizers
    parts = [
        f'<h2>{_text(name)}</h2><p class="soft">{_text(" · ".join(told))}</p>',
        f'<p class="peak">{format_bytes(report.peak_bytes)} <small>at the peak</small></p>',
        _bar(report.categories, max(report.peak_bytes, sum(report.categories.values()))),
        _categories(report),
        *(f'<p class="note">{_text(note)}</p>' for note in report.notes),
    ]
    sections = {
        "What to do": _advice(report),
        "Peak of each phase": _phases(report, highest_phase),
        "Over time": _timeline(report, highest),
        "Modules at the peak": _modules(report),
        "Largest tensors at the peak": _tensors(report),
        "Kept in two precisions": _duplicates(report),
        "Allocator": _health(report),
    }
    parts += [f"<h3>{title}</h3>{content}" for title, content in sections.items() if content]
    return f'<article class="card">{"".join(parts)}</article>'


def _categories(report: MemoryReport) -> str:
    columns = (
        _Column("category"),
        _Column("memory", "n"),
        _Column("share", "n"),
        _Column("bytes per parameter", "n wide"),
    )
    rows = []
    for category in Category:
        if size := report.categories.get(category, 0):
            each = f"{size / report.parameters:.2f}" if category in MODEL_STATE and report.parameters else ""
            cells = [_key(category), format_bytes(size), format_share(size, report.peak_bytes), each]
            rows.append(_row(columns, cells))
    peak = [format_bytes(report.peak_bytes), format_share(report.peak_bytes, report.peak_bytes)]
    rows.append(_row(columns, ["peak", *peak, ""], "sum"))
    return _table(columns, rows)


def _advice(report: MemoryReport) -> str:
    advice = advise(report)
    first = "".join(f"<p>{_text(one.text)}</p>" for one in advice if one.saves_bytes is None)
    rest = [f"<li>{_text(one.text)}</li>" for one in advice if one.saves_bytes is not None]
    return first + (f"<ol>{''.join(rest[:_ADVICE])}</ol>" if rest else "")


def _phases(report: MemoryReport, highest: int) -> str:
    return "".join(
        f'<div class="row"><span>{_text(spoken(name))}</span>{_bar(phase.categories, highest)}'
        f"<span>{format_bytes(phase.peak_bytes)}</span></div>"
        for name, phase in report.phases.items()
    )


def _timeline(report: MemoryReport, highest: int) -> str:
    drawn = timeline_svg(report, highest)
    told = "Point at a moment to see what was there."
    return f"<figure>{drawn}<output>{told}</output></figure>" if drawn else ""


def _modules(report: MemoryReport) -> str:
    root = module_tree(report)
    whole = root.bytes
    least = _LEAST_SHARE * report.peak_bytes
    return "".join(_node(node, whole, least, open_levels=2) for node in top_level(root))


def _node(node: Node, whole: int, least_bytes: float, open_levels: int) -> str:
    size = node.bytes
    if size < least_bytes or not size:
        return ""
    inside = "".join(_node(child, whole, least_bytes, open_levels - 1) for child in node.children)
    return _summary(node, size, whole, leaf=not inside, opened=open_levels > 0, inside=inside)


def _summary(node: Node, size: int, whole: int, *, leaf: bool, opened: bool, inside: str) -> str:
    times = f'<span class="times">&times;{len(node.paths)}</span>' if node.repeated else ""
    kind = ' class="leaf"' if leaf else ""
    return (
        f"<details{kind}{' open' if opened and not leaf else ''}><summary><span>{_text(node.name)}{times}</span>"
        f"{_bar(node.total, whole)}<span>{format_bytes(size)}</span></summary>{inside}</details>"
    )


def _tensors(report: MemoryReport) -> str:
    columns = (
        _Column("memory", "n"),
        _Column("category", "wide"),
        _Column("shape", "whole"),
        _Column("type", "wide"),
        _Column("module"),
        _Column("born in", "wide"),
    )
    rows = []
    for tensor in report.tensors[:_TENSORS]:
        shape = format_shape(tensor.shape)
        module = "" if tensor.module is None else tensor.module or "(root)"
        cells = [_swatch(tensor.category) + format_bytes(tensor.bytes), in_words(tensor.category)]
        cells += [_text(told) for told in (shape, tensor.dtype or "", module, spoken(tensor.phase or "before"))]
        rows.append(_row(columns, cells))
    return _table(columns, rows) if rows else ""


def _duplicates(report: MemoryReport) -> str:
    columns = (_Column("module"), _Column("shape", "whole"), _Column("types"), _Column("smaller copy", "n"))
    largest = sorted(report.duplicates, key=lambda double: -double.bytes)
    rows = [
        _row(
            columns,
            [
                _text(double.module or "(root)"),
                _text(format_shape(double.shape)),
                _text(" and ".join(double.dtypes)),
                format_bytes(double.bytes),
            ],
        )
        for double in largest[:_DUPLICATES]
    ]
    if left := largest[_DUPLICATES:]:
        rest = format_bytes(sum(double.bytes for double in left))
        rows.append(_row(columns, [f"and {len(left)} more", "", "", rest]))
    return _table(columns, rows) if rows else ""


def _health(report: MemoryReport) -> str:
    health = report.health
    if health is None:
        return ""
    columns = (_Column(""), _Column("memory", "n"), _Column("share of the device", "n"))
    sizes = {
        "held from the device": health.reserved_bytes,
        "of it in no live block": health.fragmented_bytes,
        "of it workspaces of libraries": health.workspace_bytes,
        "used by others": health.outside_bytes,
    }
    rows = [
        _row(columns, [name, format_bytes(size), format_share(size, health.total_bytes)])
        for name, size in sizes.items()
    ]
    if health.retries:
        rows.append(_row(columns, ["gave memory back and asked again", count_of(health.retries, "time"), ""]))
    return _table(columns, rows)
