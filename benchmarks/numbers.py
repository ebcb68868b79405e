"""The numbers of README and docs, from the kept results: nothing is typed by hand, so nothing drifts.

    python -m benchmarks.numbers           # fill them in
    python -m benchmarks.numbers --check   # exit 1 where a file says something else

Between `<!-- numbers: NAME -->` and `<!-- /numbers -->` stands what a function here makes of a file in
benchmarks/results. What has not been measured says so.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, ROOT

PAGES = (ROOT / "README.md", ROOT / "docs" / "numbers.md")
BLOCK = re.compile(r"(<!-- numbers: (?P<name>[\w-]+) -->\n).*?(<!-- /numbers -->)", re.DOTALL)
EXACT = "mpt exact (split)"


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with every block made anew from the results. KeyError where a block's name is none of `NUMBERS`."""
    return BLOCK.sub(lambda block: f"{block[1]}{number(block['name'], results)}\n{block[3]}", text)


def number(name: str, results: Path = RESULTS) -> str:
    """What is to stand in the block of that name."""
    file, make = NUMBERS[name]
    path = results / f"{file}.json"
    if not path.exists():
        return f"Not measured yet: `python -m benchmarks.{MODULES.get(file, file)}`."
    return make(json.loads(path.read_text(encoding="utf-8")))


def memory(result: dict[str, Any]) -> str:
    """Peaks as a share of FP32's, a row for a network."""
    precisions = [row["precision"] for row in next(iter(result["cases"].values()))["rows"]]
    rows = []
    for network, case in result["cases"].items():
        shares = {row["precision"]: row["share_of_32_true"] for row in case["rows"]}
        fp32 = next(row["peak_bytes"] for row in case["rows"] if row["precision"] == "32-true")
        rows.append([network, f"{fp32 / 2**20:.0f} MiB", *(f"{shares[name]:.3f}" for name in precisions[1:])])
    return table(["peak of a step", "`32-true`", *(f"`{name}`" for name in precisions[1:])], rows) + source(result)


def step_time(result: dict[str, Any]) -> str:
    """Steps against fused FP32 AdamW, a row for a way to step, a column for a model."""
    timed: dict[str, dict[str, str]] = {}
    for row in result["time"]:
        model = f"{row['parameters'] / 1e6:.0f}M in {row['tensors']} tensors, {row['device'].upper()}"
        timed.setdefault(row["case"], {})[model] = f"{row['times_the_reference']:.2f}"
    models = list(next(iter(timed.values())))
    rows = [[case, *(by_model.get(model, "") for model in models)] for case, by_model in timed.items()]
    return table(["a step, times torch's fused FP32 AdamW", *models], rows) + source(result)


def held(result: dict[str, Any]) -> str:
    """Bytes that the allocator holds per parameter, and what a step takes on top."""
    rows = [
        [
            row["model"],
            row["case"],
            f"{row['expected_bytes_per_parameter']:.2f}",
            f"{row['held_bytes_per_parameter']:.2f}",
            f"{row['extra_share']:.1%}",
        ]
        for row in result["memory"]
    ]
    return table(["model", "step", "bytes per parameter", "measured", "a step adds"], rows) + source(result)


def step_range(result: dict[str, Any]) -> str:
    """In words: what a step of ours costs on a CPU, by masters."""

    def span(case: str) -> str:
        large = [row for row in result["time"] if row["device"] == "cpu" and row["case"] == case]
        times = [row["times_the_reference"] for row in large if 100 <= row["tensors"] < 200]  # the GPTs
        return f"{min(times):.1f} to {max(times):.1f}"

    small = max(row["times_the_reference"] for row in result["time"] if row["case"] == EXACT and row["device"] == "cpu")
    return (
        f"A step there takes {span(EXACT)} times torch's fused FP32 AdamW (`float32` masters: "
        f"{span('mpt float32 masters')}; up to {small:.1f} over many small tensors), a few per cent of a training\n"
        "step. `compact` takes many times more: it trades time on a CPU for memory. The update for CPUs is written\n"
        "to be right, the fast one is for the GPU."
    )


def accuracy(result: dict[str, Any]) -> str:
    """Validation losses by precision, against FP32's own seeds."""
    rows = []
    for row in result["summary"]:
        is_reference = row["precision"] == row["reference"]
        rows.append(
            [
                f"`{row['precision']}`",
                f"{row['mean']:.4f}",
                f"{row['lowest']:.4f} to {row['highest']:.4f}",
                "" if is_reference else f"{row['mean_difference']:+.4f}",
                "" if is_reference else ("yes" if row["within_the_references_spread"] else "no"),
            ]
        )
    seeds = result["summary"][0]["seeds"]
    head = ["precision", "nats per byte", f"{seeds} seeds", "against FP32", "within FP32's spread"]
    run = result["runs"][0]
    products = result["environment"].get("half_products", "")
    note = f"\n\nThe example's GPT, `{run['size']}`, {run['steps']} steps. Half products: {products}."
    return table(head, rows) + note + source(result)


def ablation(result: dict[str, Any]) -> str:
    """What is lost without each part, and whether the loss shows it."""
    rows = []
    for row in result["summary"]:
        lost = "" if row["vanished_updates"] is None or "masters" not in row["without"] else row["vanished_updates"]
        rows.append(
            [
                row["case"],
                f"{row['loss']:.4f}",
                f"{row['above_fp32']:+.4f}",
                "" if row["shows"] is None else ("yes" if row["shows"] else "no"),
                f"{row['zero_activation_gradients']:.1%}",
                lost and f"{lost:.1%}",
                f"{row['skipped_steps']:g}",
            ]
        )
    head = ["run", "nats per byte", "against FP32", "shows", "gradients that are 0", "updates lost", "skipped"]
    return table(head, rows) + source(result)


def preset_cost(result: dict[str, Any]) -> str:
    """In words: what each preset costs in accuracy."""
    rows = {row["precision"]: row for row in result["summary"]}
    presets = {"exact": "mpt-bf16-true", "compact": "mpt-bf16-true:compact", "minimal": "mpt-bf16-true:minimal"}
    costs = ", ".join(f"`{name}` {rows[row]['mean_difference']:+.4f}" for name, row in presets.items())
    fp32, run = rows["32-true"], result["runs"][0]
    spread = fp32["highest"] - fp32["lowest"]
    return (
        f"On the example (`{run['size']}`, {run['steps']} steps on a CPU, {fp32['seeds']} seeds) they end at {costs}\n"
        f"nats per byte from FP32, whose own seeds are {spread:.4f} apart; `minimal` against FP32 without clipping."
    )


def profiler(result: dict[str, Any]) -> str:
    """How far peaks are off, ours and torch's MemTracker's."""
    rows = [
        [
            row["network"],
            f"{row['allocator_bytes'] / 2**20:.1f} MiB",
            f"{row['recorder_error']:.2%}",
            f"{row['tracker_error']:.2%}",
        ]
        for row in result["peak"]
    ]
    return table(["network", "the allocator's peak", "here", "torch's MemTracker"], rows) + source(result)


def estimate(result: dict[str, Any]) -> str:
    """How far estimates are off, and what the large one takes."""
    worst = max(abs(error) for row in result["rows"] for error in row["errors"].values())
    lines = [
        f"{len(result['rows'])} pairs of network and precision: no category further off than {worst:.4%} of the peak."
    ]
    return "\n".join(lines) + source(result)


def networks(result: dict[str, Any]) -> str:
    """What is saved on networks that people train, FP32's shares beside what is said of them, and what then fits."""
    precisions = list(dict.fromkeys(row["precision"] for row in result["networks"]))
    by_network = {
        row["network"]: [one for one in result["networks"] if one["network"] == row["network"]]
        for row in result["networks"]
    }
    unfinished = [name for name, rows in by_network.items() if len(rows) < len(precisions)]
    by_network = {name: rows for name, rows in by_network.items() if name not in unfinished}
    memories = list(result["networks"][0]["largest_batch"])
    saved, shares, batches = [], [], []
    for name, rows in by_network.items():
        fp32 = rows[0]
        of = f"{name}, {fp32['batch_size']} x {fp32['input']}"
        saved.append([of, f"{fp32['peak_bytes'] / 1e9:.1f} GB", *(f"{row['saved']:.0%}" for row in rows[1:])])
        claims = [f"{one['share']:.0%}{'' if one['holds'] else ' (no)'}" for one in fp32["claims"]]
        shares.append([name, f"{fp32['parameters'] / 1e6:.0f} M", *claims])
        fit = [" / ".join(str(row["largest_batch"][memory] or "none") for memory in memories) for row in rows]
        batches.append([name, *fit])
    said = [f"{one['about']}, said {one['low']:.0%} to {one['high']:.0%}" for one in result["networks"][0]["claims"]]
    columns = [f"`{name}`" for name in precisions]
    models = [
        [f"`{row['precision']}`", *(_model(model) for model in row["largest_model"].values())]
        for row in result["largest_models"]
    ]
    errors = [abs(error) for row in result["largest_models"] if (error := row["error_for_gpt2_large"]) is not None]
    checked = f", for GPT-2 large {max(errors):.2%} off at most" if errors else ""
    sizes = " / ".join(memories)
    parts = [
        table(["saved of a step's peak, estimated", "`32-true`", *columns[1:]], saved),
        table(["FP32's peak, estimated", "parameters", *said], shares),
        table([f"largest batch in {sizes}, estimated", *columns], batches),
        table(["largest GPT-2 at 8 x 1024 tokens, estimated", *memories], models),
        f"These models' peaks are extended from few layers of three widths{checked}.",
    ]
    if unfinished:
        parts.append(f"Not done yet: {', '.join(unfinished)}.")
    return "\n\n".join(parts) + source(result)


def _model(model: dict[str, int]) -> str:
    if not model["layers"]:
        return "none"
    return f"{model['parameters'] / 1e9:.2f} B ({model['layers']} layers, {model['width']} wide)"


def networks_measured(result: dict[str, Any]) -> str:
    """Estimates beside what a step on a GPU took."""
    rows = []
    for row in result["networks"]:
        real = row.get("measured_peak_bytes")
        shown = f"{real / 1e9:.2f} GB" if real else "failed" if "error" in row else "does not fit"
        error = f"{row['peak_bytes'] / real - 1:+.1%}" if real else ""
        rows.append([row["network"], f"`{row['precision']}`", f"{row['peak_bytes'] / 1e9:.2f} GB", shown, error])
    return table(["network", "precision", "estimated", "measured", "off by"], rows) + source(result)


NUMBERS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "memory": ("memory_cpu", memory),
    "step-time": ("step_time", step_time),
    "step-range": ("step_time", step_range),
    "held": ("step_time", held),
    "accuracy": ("accuracy_cpu", accuracy),
    "ablation": ("ablation_cpu", ablation),
    "preset-cost": ("accuracy_cpu", preset_cost),
    "profiler": ("profiler_cpu", profiler),
    "estimate": ("estimate_cpu", estimate),
    "networks": ("networks", networks),
    "networks-measured": ("networks_cuda", networks_measured),
}
MODULES = {
    "memory_cpu": "memory",
    "accuracy_cpu": "accuracy",
    "profiler_cpu": "profiler",
    "estimate_cpu": "estimate",
    "ablation_cpu": "ablation",
    "networks_cuda": "networks --measure",
}


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def source(result: dict[str, Any]) -> str:
    """Where a number is from."""
    where = result["environment"]
    device = where["gpu"]["name"] if where["gpu"] else f"{where['cpu']}, {where['cpu_threads']} threads"
    return (
        f"\n\n{device}, torch {where['versions']['torch']}, commit {where['commit'][:10]}, {where['date'][:10]}: "
        f"`{where['command']}`"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Fill in the pages. Returns 1 where `--check` finds one that is not what the results say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.numbers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing, and tell which pages are out of date")
    arguments = parser.parse_args(argv)
    stale = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (now := filled(text)) != text:
            stale.append(page.relative_to(ROOT))
            if not arguments.check:
                page.write_text(now, encoding="utf-8")
    for page in stale:
        print(f"{page}: {'not what the results say' if arguments.check else 'filled in'}")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
