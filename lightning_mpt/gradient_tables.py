"""Histograms of gradients' exponents as tables (rich) and as a picture (matplotlib, the extra `plots`). Only draws."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .exponents import FP16_HIGHEST, FP16_LOWEST, LOWEST, ExponentHistogram

Histograms = Mapping[str, Mapping[str, ExponentHistogram]]
"""By kind (`weights`, `activations`), then by module."""

SCALES = tuple(2.0**exponent for exponent in range(3, 25, 3))
"""From 8, which saved the paper's detector, to 2**24."""
_ROWS = 10
_INK, _BLUE, _RED, _FAINT = "#333333", "#4c78a8", "#e45756", "#d9d9d9"


def print_histograms(kinds: Histograms, constant_scale: float | None, head_room: float, console: Console) -> None:
    """For each kind, its modules; then what scaling does to all of them, and the constant that fits."""
    if not kinds:
        console.print("No gradients were seen.")
        return
    for kind, modules in kinds.items():
        console.print(module_table(kind, modules))
    every = ExponentHistogram.sum(one for modules in kinds.values() for one in modules.values())
    console.print(scale_table(every, constant_scale))
    if constant_scale is None:
        console.print("Every gradient is zero or not finite: no constant loss scale to choose.")
    else:
        console.print(
            f"The largest is {every.largest:.3g}. With room for {head_room:g} times it, a constant loss scale of "
            f"{power(constant_scale)} = {constant_scale:g} fits."
        )


def module_table(kind: str, modules: Mapping[str, ExponentHistogram]) -> Table:
    """The modules that fp16 costs most come first."""
    table = _table(f"Gradients of {kind}", "module", "zero", "< 2^-24", "in fp16", "inf, NaN")
    ordered = sorted(modules.items(), key=lambda item: item[1].shares().below, reverse=True)
    rows = [("all", ExponentHistogram.sum(modules.values())), *ordered[:_ROWS]]
    if ordered[_ROWS:]:
        rows.append((f"{len(ordered) - _ROWS} others", ExponentHistogram.sum(one for _, one in ordered[_ROWS:])))
    for path, histogram in rows:
        zero, below, inside, above, not_finite = histogram.shares()
        # Text, folded: a path may hold what rich takes for markup, and any part of it may be what tells modules apart.
        table.add_row(Text(path or "(root)", overflow="fold"), *map(percent, (zero, below, inside, above + not_finite)))
    return table


def scale_table(histogram: ExponentHistogram, constant_scale: float | None) -> Table:
    """What each power of two saves and loses."""
    table = _table("Scaled", "loss scale", "< 2^-24", "saved", "lost")
    for scale in sorted({1.0, *SCALES, *([] if constant_scale is None else [constant_scale])}):
        shares = (histogram.shares(scale).below, histogram.saved(scale), histogram.lost(scale))
        table.add_row(power(scale), *map(percent, shares), style="bold" if scale == constant_scale else None)
    return table


def percent(share: float) -> str:
    """`12.3 %`; what is there and too little to see is `< 0.1 %`, and nothing is a dash."""
    if share == 0:
        return "-"
    return "< 0.1 %" if abs(share) < 0.001 else f"{100 * share:.1f} %"


def power(scale: float) -> str:
    return f"2^{math.frexp(scale)[1] - 1}"


def _table(title: str, first: str, *others: str) -> Table:
    table = Table(first, title=title, title_justify="left", title_style="bold", pad_edge=False)
    for other in others:
        table.add_column(other, justify="right", no_wrap=True)
    return table


def write_histogram_plot(kinds: Histograms, constant_scale: float | None, path: str | Path) -> None:
    """Draw the share of every exponent, a panel for each kind, into `path`: .png, .svg or .pdf.

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

    figure = Figure(figsize=(9.6, 0.6 + 2.9 * max(len(kinds), 1)), dpi=150, layout="constrained")
    panels: list[Any] = list(figure.subplots(max(len(kinds), 1), 1, sharex=True, squeeze=False)[:, 0])
    for axes, (kind, modules) in zip(panels, kinds.items(), strict=False):
        _draw(axes, kind, ExponentHistogram.sum(modules.values()), constant_scale)
    panels[-1].set_xlabel("exponent: floor(log2 |gradient|)", color=_INK, fontsize=9)
    figure.savefig(path, facecolor="white")


def _draw(axes: Any, kind: str, histogram: ExponentHistogram, constant_scale: float | None) -> None:
    total = max(histogram.total, 1)
    bars = {LOWEST + index: 100 * count / total for index, count in enumerate(histogram.counts) if count}
    colors = [_RED if exponent < FP16_LOWEST else _BLUE for exponent in bars]
    axes.bar(list(bars), list(bars.values()), width=0.9, color=colors)
    shares = histogram.shares()
    zero, below = (percent(share) if share else "none" for share in shares[:2])
    title = f"Gradients of {kind}: {zero} zero, {below} below 2^-24"
    axes.set_title(title, loc="left", fontsize=11, color=_INK, parse_math=False)
    # The paper's figure has the share on a logarithmic axis: few values at the ends decide about the scale.
    axes.set_yscale("log")
    axes.set_ylabel("% of all values", color=_INK, fontsize=9)
    axes.axvspan(FP16_LOWEST - 0.5, FP16_HIGHEST + 0.5, color=_FAINT, alpha=0.4, zorder=0, linewidth=0)
    axes.text(FP16_HIGHEST, 1.0, "fp16 ", transform=axes.get_xaxis_transform(), ha="right", va="top", fontsize=9)
    if constant_scale is not None:
        lowest = FP16_LOWEST - (math.frexp(constant_scale)[1] - 1) - 0.5
        axes.axvline(lowest, color=_INK, linewidth=0.9, linestyle=(0, (3, 2)))
        label = f" fp16 with a loss scale of {power(constant_scale)} begins here"
        transform = axes.get_xaxis_transform()
        axes.text(lowest, 1.0, label, transform=transform, va="top", fontsize=8.5, color=_INK, parse_math=False)
    axes.tick_params(colors=_INK, length=0, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_FAINT)
