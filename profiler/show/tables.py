"""The tables that a report is made of, for a terminal. They measure nothing, and fit from 60 columns on."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ..category import MODEL_STATE, Category
from ..figures import AllocatorHealth, Duplicate
from ..report import MemoryReport
from .advisor import Advice
from .tree import Node, largest, module_tree
from .words import count_of, format_bytes, format_in, format_shape, format_share, printable, spoken, unit_of

Thing = TypeVar("Thing")

WIDE = 88
"""From this many columns on there is room for all that a table has to say."""
NAME_COLUMNS, SIZE_COLUMNS, FIGURE_COLUMNS = 15, 14, 11
"""What a category's name takes; a size with its unit beside another; and a size without, under a phase's name."""
LEAST_SHARE = 0.005
"""Of the peak: modules with less are left out."""
STYLES = {Category.UNATTRIBUTED: "yellow", Category.ROUNDING: "dim"}


@dataclass
class ByWidth:
    """Something that looks different in another width."""

    make: Callable[[int], RenderableType]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.make(options.max_width)


def portions(things: Sequence[Thing], room: int) -> list[Sequence[Thing]]:
    """`things` in as few portions as there must be where `room` of them fit, about as many in each."""
    count = -(-len(things) // max(1, room))
    each = -(-len(things) // max(1, count))
    return [things[at * each : (at + 1) * each] for at in range(count)]


def apart(parts: Iterable[RenderableType]) -> Group:
    """The parts, with an empty line between one and the next."""
    spaced: list[RenderableType] = []
    for part in parts:
        spaced += ["", part] if spaced else [part]
    return Group(*spaced)


def new_table(first: str, *rest: str) -> Table:
    """A table with a column of names and columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column(Text(first), overflow="fold")
    for heading in rest:
        table.add_column(Text(heading), justify="right", min_width=6, overflow="fold")
    return table


def category_table(report: MemoryReport) -> Table:
    """Bytes by category at the peak, their share, and bytes per parameter of what grows with the model."""
    table = new_table("category", "memory", "share", "bytes per parameter")
    peak = report.peak_bytes
    for category in Category:
        if size := report.categories.get(category, 0):
            per_parameter = _per_parameter(size, report) if category in MODEL_STATE else ""
            cells = (category.value, format_bytes(size), format_share(size, peak), per_parameter)
            table.add_row(*cells, style=STYLES.get(category))
    table.add_section()
    table.add_row("peak", format_bytes(peak), format_share(peak, peak), "", style="bold")
    if report.parameters:
        model = sum(report.categories.get(category, 0) for category in MODEL_STATE)
        cells = ("model state of it", format_bytes(model), format_share(model, peak), _per_parameter(model, report))
        table.add_row(*cells, style="dim")
    return table


def phase_table(report: MemoryReport) -> RenderableType:
    """Every phase's own peak by category; where there is little room, all in one unit that the heading names.

    Where they do not fit beside each other even so, there are several tables.
    """
    highest = max(phase.peak_bytes for phase in report.phases.values())
    unit_bytes, unit = unit_of(highest)

    def make(width: int) -> RenderableType:
        wide = width >= NAME_COLUMNS + SIZE_COLUMNS * len(report.phases)
        room = (width - NAME_COLUMNS) // (SIZE_COLUMNS if wide else FIGURE_COLUMNS)
        return apart(table_of(names, wide) for names in portions(tuple(report.phases), room))

    def table_of(names: Sequence[str], wide: bool) -> Table:
        def cell(size: int) -> str:
            return blank_or_bytes(size) if wide else format_in(unit_bytes, size)

        phases = [report.phases[name] for name in names]
        table = new_table("phase peaks" if wide else f"peaks, {unit}", *map(spoken, names))
        table.columns[0].no_wrap = True
        for category in Category:
            sizes = [phase.categories.get(category, 0) for phase in phases]
            if any(sizes):
                table.add_row(category.value, *map(cell, sizes), style=STYLES.get(category))
        table.add_section()
        peaks = [Text(cell(p.peak_bytes), "bold" if p.peak_bytes == highest else "") for p in phases]
        table.add_row(Text("peak", "bold"), *peaks)
        return table

    return ByWidth(make)


_COLUMNS: dict[str, tuple[Category, ...]] = {
    "activations": (Category.ACTIVATIONS,),
    "weights + masters": (Category.WEIGHTS, Category.MASTER_WEIGHTS),
    "gradients": (Category.GRADIENTS,),
    "state": (Category.OPTIMIZER_STATE,),
}
_NARROW_COLUMNS: dict[str, tuple[Category, ...]] = {
    "activations": (Category.ACTIVATIONS,),
    "model state": MODEL_STATE,
}


def module_table(report: MemoryReport, rows: int) -> RenderableType | None:
    """The largest modules as an indented tree, at the peak. None where no byte has a module."""
    nodes = largest(module_tree(report), rows, LEAST_SHARE * report.peak_bytes)
    if not nodes:
        return None

    def make(width: int) -> Table:
        table = table_of(_COLUMNS)
        return table if _width(table) <= width else table_of(_NARROW_COLUMNS)

    def table_of(groups: dict[str, tuple[Category, ...]]) -> Table:
        table = new_table("modules", *groups, "total")
        for depth, node in nodes:
            total = node.total
            sizes = [sum(total.get(category, 0) for category in group) for group in groups.values()]
            table.add_row(_label(depth, node), *map(blank_or_bytes, sizes), Text(format_bytes(node.bytes), "bold"))
        return table

    return ByWidth(make)


def _width(table: Table) -> int:
    """That in which no cell is broken."""
    return Console(width=1000).measure(table).maximum


def _label(depth: int, node: Node) -> Text:
    text = Text("  " * depth + printable(node.name))
    if node.repeated:
        text.append(f"  x{len(node.paths)}", "cyan")
    return text


def tensor_table(report: MemoryReport, rows: int) -> RenderableType | None:
    """The largest blocks alive at the peak."""
    if not report.tensors:
        return None

    def make(width: int) -> Table:
        wide = width >= WIDE
        table = new_table("largest tensors" if wide else "largest")
        for heading in ("category", "shape", "dtype", "module", "born in") if wide else ("what", "module"):
            table.add_column(heading, overflow="fold")
        for tensor in report.tensors[:rows]:
            what = (tensor.category.value, format_shape(tensor.shape), printable(tensor.dtype or ""))
            if not wide:
                what = (" ".join(filter(None, what)),)  # type: ignore[assignment]
            born = (spoken(tensor.phase or "before"),) if wide else ()
            module = "" if tensor.module is None else printable(tensor.module) or "(root)"
            table.add_row(format_bytes(tensor.bytes), *map(Text, (*what, module, *born)))
        table.columns[0].justify = "right"
        table.columns[0].no_wrap = True
        return table

    return ByWidth(make)


def duplicates_line(duplicates: Sequence[Duplicate]) -> Text | None:
    """How many values are there twice, and what the smaller copies take."""
    if not duplicates:
        return None
    total = format_bytes(sum(double.bytes for double in duplicates))
    return Text(f"{count_of(len(duplicates), 'value')} kept in two precisions: {total} in the smaller copies", "yellow")


def duplicates_table(duplicates: Sequence[Duplicate], rows: int) -> Table | None:
    if not duplicates:
        return None
    table = new_table("kept in two precisions")
    for heading in ("shape", "types"):
        table.add_column(heading, overflow="fold")
    table.add_column("smaller copy", justify="right", no_wrap=True)
    for double in sorted(duplicates, key=lambda double: -double.bytes)[:rows]:
        types = " and ".join(map(printable, double.dtypes))
        cells = (printable(double.module) or "(root)", format_shape(double.shape), types, format_bytes(double.bytes))
        table.add_row(*map(Text, cells))
    left = len(duplicates) - rows
    if left > 0:
        rest = sum(sorted(double.bytes for double in duplicates)[:left])
        table.add_row(f"and {left} more", "", "", format_bytes(rest), style="dim")
    return table


def health_table(health: AllocatorHealth) -> Table:
    """What the caching allocator holds, and how well it uses it."""
    table = new_table("allocator", "memory", "share")
    whole = health.total_bytes
    table.add_row(
        "held from the device", format_bytes(health.reserved_bytes), format_share(health.reserved_bytes, whole)
    )
    for name, size in (
        ("  in no live block", health.fragmented_bytes),
        ("  library workspaces", health.workspace_bytes),
    ):
        table.add_row(name, format_bytes(size), format_share(size, whole))
    table.add_row("used by others", format_bytes(health.outside_bytes), format_share(health.outside_bytes, whole))
    table.add_row("device", format_bytes(whole), format_share(whole, whole))
    if health.retries:
        table.add_row("gave memory back and asked again", count_of(health.retries, "time"), "", style="yellow")
    return table


def notes_text(notes: Sequence[str]) -> Text | None:
    """What a reader must know, a line each."""
    return Text("\n".join(f"note: {printable(note)}" for note in notes), "yellow") if notes else None


def advice_table(advice: Sequence[Advice], rows: int) -> Table | None:
    """What holds the peak, and the first `rows` things that would lower it, numbered."""
    if not advice:
        return None
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(justify="right", style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    number = 0
    for one in advice:
        if one.saves_bytes is not None:
            number += 1
            if number > rows:
                break
        table.add_row(f"{number}." if one.saves_bytes is not None else "", Text(printable(one.text)))
    return table


def blank_or_bytes(size: int) -> str:
    return format_bytes(size) if size else ""


def _per_parameter(size: int, report: MemoryReport) -> str:
    return f"{size / report.parameters:.2f}" if report.parameters else ""
