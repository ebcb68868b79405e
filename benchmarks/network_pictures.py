"""The estimates of `benchmarks.networks` as one picture. It draws, and estimates nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lightning_mpt.profiler import Category
from lightning_mpt.profiler.show.timeline import COLORS
from lightning_mpt.profiler.show.words import in_words

_INK, _FAINT = "#333333", "#d9d9d9"
_SHADES = ("#333333", "#a0a0a0", "#c9a9a6", "#9ecae1", "#4292c6", "#084594")
"""FP32, Lightning's two, then ours, the less memory the darker."""
_IN_A_ROW = 4
_REST = "the rest"


def draw(result: Mapping[str, Any], path: Path) -> None:
    """A panel for each network, of stacked bars, and below them the largest batches and models, into `path`."""
    names = list(dict.fromkeys(row["network"] for row in result["networks"]))
    lines = -(-len(names) // _IN_A_ROW)
    figure = Figure(figsize=(15, 2.5 * lines + 5.2), dpi=130, layout="constrained")
    figure.suptitle(
        "Peak memory of a training step on a CUDA device, AdamW: ESTIMATED",
        fontsize=15, color=_INK, x=0.01, ha="left",
    )  # fmt: skip
    above, below = figure.subfigures(2, 1, height_ratios=[2.5 * lines, 4.6])
    panels = list(above.subplots(lines, _IN_A_ROW, squeeze=False).flat)
    categories = _shown(result["networks"])
    for index, axes in enumerate(panels):
        if index < len(names):
            rows = [row for row in result["networks"] if row["network"] == names[index]]
            _network(axes, rows, categories, labels=index % _IN_A_ROW == 0)
        else:
            axes.set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    above.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=10.5)
    left, right = below.subplots(1, 2, width_ratios=[1, 1.15])
    _batches(left, result["networks"], names)
    _models(right, result["largest_models"])
    handles, labels = left.get_legend_handles_labels()
    below.legend(handles, labels, loc="outside upper left", ncols=len(labels), frameon=False, fontsize=10.5)
    figure.savefig(path, facecolor="white")


def _shown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Categories that are two per cent of some peak; what is smaller is drawn as one."""
    large = {c for row in rows for c, size in row["categories"].items() if size > 0.02 * row["peak_bytes"]}
    return [category.value for category in Category if category.value in large]


def _network(axes: Any, rows: Sequence[Mapping[str, Any]], categories: Sequence[str], *, labels: bool) -> None:
    places = range(len(rows))
    ends = [0.0] * len(rows)
    for category in (*categories, _REST):
        if category == _REST:
            sizes = [row["peak_bytes"] / 1e9 - end for row, end in zip(rows, ends, strict=True)]
            color, label = _FAINT, _REST
        else:
            sizes = [row["categories"][category] / 1e9 for row in rows]
            color, label = COLORS[Category(category)], in_words(Category(category))
        axes.barh(places, sizes, left=ends, color=color, label=label, height=0.74, linewidth=0)
        ends = [end + size for end, size in zip(ends, sizes, strict=True)]
    longest = max(ends)
    for place, row in zip(places, rows, strict=True):
        saved = f"  -{row['saved']:.0%}" if row["saved"] else ""
        axes.text(
            ends[place] + 0.015 * longest, place, f"{ends[place]:.1f}{saved}", va="center", fontsize=9, color=_INK
        )
    axes.set_yticks(places, [_short(row["precision"]) if labels else "" for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 1.24 * longest)
    first = rows[0]
    title = f"{first['network']}  {_count(first['parameters'])}, {first['batch_size']} x {first['input']}"
    _dress(axes, title, "x")
    axes.set_xlabel("GB", fontsize=9, color=_INK)


def _batches(axes: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """The largest batch in 80 GB as a multiple of FP32's."""
    largest = {(row["network"], row["precision"]): row["largest_batch"]["80 GB"] for row in rows}
    precisions = list(dict.fromkeys(row["precision"] for row in rows))
    labels = []
    for place, name in enumerate(names):
        base = largest.get((name, precisions[0]), 0)
        labels.append(f"{name} ({base})")
        for precision, shade in zip(precisions, _SHADES, strict=False):
            if base and (size := largest.get((name, precision))):
                axes.plot(size / base, place, "o", color=shade, markersize=7.5, clip_on=False)
    for precision, shade in zip(precisions, _SHADES, strict=False):
        axes.plot([], [], "s", color=shade, markersize=9, label=_short(precision))
    axes.set_yticks(range(len(names)), labels)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0.9)
    _dress(axes, "Largest batch in 80 GB, as a multiple of 32-true's (in brackets)", "both")


def _models(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        axes.set_visible(False)
        return
    memories = list(rows[0]["largest_model"])
    width = 0.8 / len(rows)
    for index, (row, shade) in enumerate(zip(rows, _SHADES, strict=False)):
        sizes = [row["largest_model"][memory]["parameters"] / 1e9 for memory in memories]
        places = [place + (index - (len(rows) - 1) / 2) * width for place in range(len(memories))]
        axes.bar(places, sizes, width=0.92 * width, color=shade, label=_short(row["precision"]))
        for place, size in zip(places, sizes, strict=True):
            axes.text(place, size, f"{size:.1f}", ha="center", va="bottom", fontsize=9, color=_INK)
    axes.set_xticks(range(len(memories)), memories)
    axes.set_ylabel("billions of parameters", fontsize=9, color=_INK)
    _dress(
        axes, f"Largest GPT-2 that trains at {rows[0]['batch_size']} x 1024 tokens (L layers, 8 + L/3 heads of 64)", "y"
    )


def _short(precision: str) -> str:
    name, _, preset = precision.partition(":")
    return f"mpt {preset or 'exact'}" if name.startswith("mpt-") else name


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def _dress(axes: Any, title: str, grid: Any) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.tick_params(colors=_INK, length=0, labelsize=9.5)
    axes.grid(axis=grid, color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_FAINT)
