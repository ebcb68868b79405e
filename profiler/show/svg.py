"""A report's timeline as SVG: stacked areas of the categories, phases marked, and what is there under the pointer."""

import math
from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise

from ..category import Category
from ..figures import TimelinePoint
from ..report import MemoryReport
from .timeline import COLORS, phase_spans, used_categories
from .words import format_bytes, in_words, spoken, unit_of

_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 720, 250, 54, 24, 22
_CHARACTER = 6.6
"""Width of one, of the labels."""


def timeline_svg(report: MemoryReport, highest_bytes: int) -> str:
    """The timeline on a scale that reaches up to `highest_bytes`; nothing where there is no timeline."""
    points = report.timeline
    if not points or highest_bytes <= 0:
        return ""
    start, span = points[0].time_ns, max(points[-1].time_ns - points[0].time_ns, 1)
    step, unit, unit_name = _ticks(highest_bytes)
    top = max(highest_bytes * 1.04, 1)

    def x(time_ns: int) -> float:
        return round(_LEFT + (_WIDTH - _LEFT) * (time_ns - start) / span, 1)

    def y(size: float) -> float:
        return round(_HEIGHT - _BOTTOM - (_HEIGHT - _BOTTOM - _TOP) * max(size, 0) / top, 1)

    parts = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="memory over time">']
    tick = 0.0
    while tick <= top:
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH}" y1="{y(tick)}" y2="{y(tick)}"/>')
        label = f"{tick / unit:g}" + (f" {unit_name}" if tick + step > top else "")
        # The last says the unit, above its line; the others are left of theirs.
        place = f'x="{_LEFT - 8}" y="{y(tick) + 4}" text-anchor="end"'
        if tick + step > top:
            place = f'x="0" y="{y(tick) - 6}"'
        parts.append(f"<text {place}>{label}</text>")
        tick += step
    floor = [0.0] * len(points)
    for category in used_categories(report):
        roof = [under + max(point.categories.get(category, 0), 0) for under, point in zip(floor, points, strict=True)]
        if roof != floor:
            outline = [*_stairs(points, roof), *reversed(_stairs(points, floor))]
            corners = " ".join(f"{x(time_ns)},{y(size)}" for time_ns, size in outline)
            title = f"<title>{in_words(category)}</title>"
            parts.append(f'<polygon points="{corners}" fill="{COLORS[category]}">{title}</polygon>')
        floor = roof
    for phase in phase_spans(report):
        left, right = x(phase.start_ns), x(phase.end_ns)
        label = spoken(phase.phase)
        parts.append(f'<line class="phase" x1="{left}" x2="{left}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        if right - left > _CHARACTER * len(label):
            middle = round((left + right) / 2, 1)
            parts.append(f'<text x="{middle}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(label)}</text>')
    parts += _hover(report, x)
    return "".join(parts) + "</svg>"


def _stairs(points: Sequence[TimelinePoint], sizes: Sequence[float]) -> list[tuple[int, float]]:
    """Corners of a line that stays at a size until the next point."""
    corners = [(points[0].time_ns, sizes[0])]
    for (_, size), (point, after) in pairwise(zip(points, sizes, strict=True)):
        corners += [(point.time_ns, size), (point.time_ns, after)]
    return corners


def _hover(report: MemoryReport, x: Callable[[int], float]) -> list[str]:
    """A strip for every point, up to the next, with its figures."""
    points = report.timeline
    edges = [*(x(point.time_ns) for point in points), float(_WIDTH)]
    strips = []
    for point, left, right in zip(points, edges[:-1], edges[1:], strict=True):
        sizes = sorted(((size, category) for category, size in point.categories.items() if size), reverse=True)
        named = ", ".join(f"{in_words(Category(category))} {format_bytes(size)}" for size, category in sizes)
        title = f"{point.time_ns / 1e6:.1f} ms, {spoken(point.phase)}: {format_bytes(point.bytes)}. {named}"
        strips.append(
            f'<rect class="at" x="{left:.1f}" y="{_TOP}" width="{max(right - left, 0.5):.1f}" '
            f'height="{_HEIGHT - _BOTTOM - _TOP}"><title>{escape(title)}</title></rect>'
        )
    return strips


def _ticks(highest_bytes: int) -> tuple[float, int, str]:
    """The step between ticks in bytes, round in its unit, of which there are some four to seven."""
    unit, name = unit_of(highest_bytes)
    rough = highest_bytes / unit / 6
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return step * power * unit, unit, name
