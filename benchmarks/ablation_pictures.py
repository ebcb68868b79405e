"""The ablations as a picture: what each costs in loss, and what it loses on the way. It draws, and measures nothing."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

_INK, _FAINT, _RED = "#333333", "#d9d9d9", "#e45756"
_GROUPS = 30
"""Points of a curve: means over as many stretches of steps."""
CURVES = {
    "Master weights": {
        "fp16": "#4c78a8",
        "bf16": "#72b7b2",
        "fp16, no masters": "#f58518",
        "bf16, no masters": _RED,
    },
    "Loss scale, fp16": {
        "fp16": "#4c78a8",
        "fp16, scale 32768": "#72b7b2",
        "fp16, scale 512": "#eeca3b",
        "fp16, scale 8": "#f58518",
        "fp16, no loss scale": _RED,
    },
    "FP32 sums": {
        "fp16": "#4c78a8",
        "bf16": "#72b7b2",
        "fp16, half sums": "#f58518",
        "bf16, half sums": _RED,
    },
}


def draw(runs: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Curves of the training loss above FP32's, and the zero gradients for every loss scale, into `path`."""
    figure = Figure(figsize=(11, 7), dpi=150, layout="constrained")
    panels = list(figure.subplots(2, 2).flat)
    for axes, (title, colors) in zip(panels, CURVES.items(), strict=False):
        for case, color in colors.items():
            steps, above = _above_fp32(runs, case)
            axes.plot(steps, above, color=color, linewidth=1.4, label=case)
        axes.axhline(0, color=_INK, linewidth=0.7)
        axes.set_xlabel("step", fontsize=9)
        axes.set_ylabel("training loss - FP32's (nats per byte)", fontsize=9)
        axes.legend(frameon=False, fontsize=8)
        _dress(axes, title)
    _zeros(panels[-1], rows)
    figure.savefig(path, facecolor="white")


def _above_fp32(runs: Sequence[Mapping[str, Any]], case: str) -> tuple[list[float], list[float]]:
    """By stretches of steps, the mean over the seeds of the loss less FP32's of the same seed."""
    losses = {(run["case"], run["seed"]): run["training_losses"] for run in runs}
    seeds = [seed for name, seed in losses if name == case and ("FP32", seed) in losses]
    curves = [[a - b for a, b in zip(losses[case, s], losses["FP32", s], strict=True)] for s in seeds]
    mean = [statistics.mean(values) for values in zip(*curves, strict=True)]
    length = max(1, len(mean) // _GROUPS)
    starts = range(0, len(mean) - length + 1, length)
    return [s + length / 2 for s in starts], [statistics.mean(mean[s : s + length]) for s in starts]


def _zeros(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """The share of zero gradients for each loss scale; FP32's is not fp16's doing."""
    zero = {row["case"]: 100 * row["zero_activation_gradients"] for row in rows}
    scaled = {case: share for case, share in zero.items() if case.startswith(("fp16, no loss", "fp16, scale"))}
    labels = [name.removeprefix("fp16, ").removeprefix("scale ").replace("no loss scale", "none") for name in scaled]
    axes.bar(labels, list(scaled.values()), color=_RED, width=0.7)
    axes.axhline(zero["FP32"], color=_INK, linewidth=0.9, linestyle=(0, (3, 2)), label="FP32")
    axes.set_xlabel("loss scale", fontsize=9)
    axes.set_ylabel("% of activations' gradients that are zero", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    _dress(axes, "Gradients flushed to zero, fp16")


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=_INK)
    axes.tick_params(colors=_INK, length=0, labelsize=8.5)
    axes.grid(axis="y", color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_FAINT)
