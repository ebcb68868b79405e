"""The numbers of README and docs, from the kept results: nothing is typed by hand, so nothing drifts.

    python -m benchmarks.numbers           # fill them in
    python -m benchmarks.numbers --check   # exit 1 where a file says something else

Between `<!-- numbers: NAME -->` and `<!-- /numbers -->` stands what a function here makes of a file in
benchmarks/results, or, where its name has a star, of each of several. What has not been measured says so.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cuda_words, words
from benchmarks.common import RESULTS, ROOT
from benchmarks.words import table

PAGES = (ROOT / "README.md", ROOT / "docs" / "numbers.md")
BLOCK = re.compile(r"(<!-- numbers: (?P<name>[\w-]+) -->\n).*?(<!-- /numbers -->)", re.DOTALL)


def filled(text: str, results: Path = RESULTS) -> str:
    """`text` with every block made anew from the results. KeyError where a block's name is none of `NUMBERS`."""
    return BLOCK.sub(lambda block: f"{block[1]}{number(block['name'], results)}\n{block[3]}", text)


def number(name: str, results: Path = RESULTS) -> str:
    """What is to stand in the block of that name."""
    file, make = NUMBERS[name]
    paths = sorted(results.glob(f"{file}.json"))
    if not paths:
        return f"Not measured yet: `python -m benchmarks.{MODULES.get(file, file)}`."
    return "\n\n".join(make(json.loads(path.read_text(encoding="utf-8"))) for path in paths)


def memory(result: dict[str, Any]) -> str:
    """Peaks as a share of FP32's, a row for a network."""
    precisions = [row["precision"] for row in next(iter(result["cases"].values()))["rows"]]
    rows = []
    for network, case in result["cases"].items():
        shares = {row["precision"]: row["share_of_32_true"] for row in case["rows"]}
        fp32 = next(row["peak_bytes"] for row in case["rows"] if row["precision"] == "32-true")
        rows.append([network, f"{fp32 / 2**20:.0f} MiB", *(f"{shares[name]:.3f}" for name in precisions[1:])])
    return table(["peak of a step", "`32-true`", *(f"`{name}`" for name in precisions[1:])], rows) + words.source(
        result
    )


def step_time(result: dict[str, Any]) -> str:
    """Steps against fused FP32 AdamW, a row for a way to step, a column for a model."""
    timed: dict[str, dict[str, str]] = {}
    for row in result["time"]:
        model = f"{row['parameters'] / 1e6:.0f}M in {row['tensors']} tensors, {row['device'].upper()}"
        timed.setdefault(row["case"], {})[model] = f"{row['times_the_reference']:.2f}"
    models = list(next(iter(timed.values())))
    rows = [[case, *(by_model.get(model, "") for model in models)] for case, by_model in timed.items()]
    return table(["a step, times torch's fused FP32 AdamW", *models], rows) + words.source(result)


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
    return table(["model", "step", "bytes per parameter", "measured", "a step adds"], rows) + words.source(result)


def accuracy(result: dict[str, Any]) -> str:
    """Figures by task and precision, against FP32's own seeds; before them, how often each precision is worse."""
    parts = [words.verdicts(result)]
    for task in result["summary"]:
        seeds = task["rows"][0]["seeds"]
        clipping = "gradients clipped" if task["clips"] else "no clipping"
        parts.append(f"`{task['task']}`: {task['what']}, {task['steps']} steps, {clipping}.")
        rows = [[f"`{name}`", *others] for name, *others in map(cells, task["rows"])]
        head = ["precision", task["unit"], f"{seeds} seeds", "against FP32", "FP32's spread"]
        parts.append(table(head, rows))
    products = f"Half products: {result['environment']['half_products']}."
    return "\n\n".join([*parts, products]) + words.source(result)


def cells(row: Mapping[str, Any]) -> list[str]:
    """A row of `accuracy` as it is shown: precision, mean, spread, difference, verdict."""
    if row["mean"] is None:
        return [row["precision"], "", "", "", row["verdict"]]
    places = 4 if row["highest"] < 10 else 2
    mean, lowest, highest = (f"{row[key]:.{places}f}" for key in ("mean", "lowest", "highest"))
    difference = None if row["precision"] == row["reference"] else row["mean_difference"]
    told = "" if difference is None else f"{difference:+.{places}f}"
    return [row["precision"], mean, f"{lowest}-{highest}", told, row["verdict"] or ""]


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
    return table(head, rows) + words.source(result)


def throughput(result: dict[str, Any]) -> str:
    """Steps, and tokens or images, a second through the Trainer."""
    rows = []
    for name, network in result["networks"].items():
        for row in network["rows"]:
            if row["status"] != "ok":
                rows.append([name, f"`{row['precision']}`", row["status"], *[""] * 4])
                continue
            times, goal = row.get("times_the_reference"), network["goal"]
            rows.append(
                [
                    name,
                    f"`{row['precision']}`",
                    "{:.1f} ({:.1f} to {:.1f})".format(*(1e3 * row[key] for key in ("median_s", "p20_s", "p80_s"))),
                    f"{row['steps_per_s']:.2f}",
                    f"{row['units_per_s']:,.0f} {network['unit']}",
                    "" if times is None else f"{times:.2f}",
                    "" if goal is None or row["precision"] != network["ours"] else f"{goal:g}",
                ]
            )
    reference = next(iter(result["networks"].values()))["reference"]
    head = ["network", "precision", "ms a step (p20 to p80)", "steps/s", "per second", f"times `{reference}`", "goal"]
    return table(head, rows) + words.source(result)


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
    return table(["network", "the allocator's peak", "here", "torch's MemTracker"], rows) + words.source(result)


def profiler_cost(result: dict[str, Any]) -> str:
    """A step's time with the profiler by its time without, and what a report takes to make."""
    rows = []
    for row in result["cost"]:
        plain = row["timings"]["without"]
        spread = (plain["p80_s"] - plain["p20_s"]) / plain["median_s"]
        rows.append([row["network"], f"{row['recording']:.3f}", f"{row['not_recording']:.3f}", f"{spread:.1%}"])
    replays = " and ".join(
        f"{row['seconds']:.1f} s for {row['events']:,} events ({row['process_peak_bytes'] / 2**30:.1f} GiB)"
        for row in result["replay"]
    )
    head = ["network", "recording", "there, and done", "spread of a step without"]
    return f"{table(head, rows)}\n\nMaking the report takes {replays}.{words.source(result)}"


def estimate(result: dict[str, Any]) -> str:
    """How far estimates are off, and what the large one takes."""
    rows = []
    for row in result["rows"]:
        of_categories = {name: abs(error) for name, error in row["errors"].items() if name != "peak"}
        worst = max(of_categories, key=lambda name: of_categories[name])
        rows.append(
            [
                row["network"],
                f"`{row['precision']}`",
                f"{row['measured']['peak_bytes'] / 2**20:.1f} MiB",
                f"{row['errors']['peak']:+.3%}",
                f"{of_categories[worst]:.3%} {worst}",
            ]
        )
    head = ["network", "precision", "measured peak", "the estimate's error", "worst category, of the peak"]
    return table(head, rows) + _large_estimate(result) + words.source(result) + words.measured_by(result)


def _large_estimate(result: dict[str, Any]) -> str:
    if "large" not in result:
        return ""
    large = " and ".join(
        f"{row['seconds']:.0f} s and {row['host_peak_rss_bytes'] / 2**30:.1f} GiB of host memory for "
        f"`{row['precision']}` ({row['peak_bytes'] / 1e9:.1f} GB)"
        for row in result["large"]["rows"]
    )
    return f"\n\nGPT-2 XL at 8 x 1024 for CUDA takes {large}."


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
    return "\n\n".join(parts) + words.source(result)


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
    return table(["network", "precision", "estimated", "measured", "off by"], rows) + words.source(result)


def lightning_suite(result: dict[str, Any]) -> str:
    """Lightning's own tests: how many pass, by folder, and why some are not to."""
    meant = [test.split("/")[1].partition("::")[0] for tests in result["explained"].values() for test in tests]
    counts = []
    for folder, count in result["folders"].items():
        theirs, ours = count["bf16-true"], count["mpt-bf16-true"]
        passed = (theirs.get("passed", 0), ours.get("passed", 0))
        counts.append([folder, sum(theirs.values()), *passed, meant.count(folder)])
    counts.append(["all", *(sum(row[column] for row in counts) for column in range(1, 5))])
    rows = [[str(cell) for cell in row] for row in counts]
    head = ["folder", "tests", "pass under `bf16-true`", "pass under `mpt-bf16-true`", "under theirs alone, by design"]
    reasons = [f"- {len(tests)}: {why}" for why, tests in result["explained"].items()]
    installed = result["environment"]["versions"]["lightning"]
    others = (
        f"Pass under theirs alone for no such reason: {len(result['unexplained'])}; at a second try alone under ours: "
        f"{len(result['at_second_try'])}.\n"
        f"The tests are of Lightning {result['tests_of_lightning']}, run with {installed}."
    )
    said = ["", "Pass under theirs alone, by design:", "", *reasons] if reasons else []
    return "\n".join([table(head, rows), *said, "", others]) + words.source(result)


NUMBERS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "memory": ("memory_cpu", memory),
    "step-time": ("step_time", step_time),
    "step-range": ("step_time", words.step_range),
    "held": ("step_time", held),
    "accuracy": ("accuracy_cpu", accuracy),
    "ablation": ("ablation_cpu", ablation),
    "throughput": ("throughput_*", throughput),
    "worse": ("accuracy_cpu", lambda result: words.verdicts(result) + words.source(result)),
    "preset-cost": ("accuracy_cpu", words.preset_cost),
    "profiler": ("profiler_cpu", profiler),
    "profiler-cost": ("profiler_cpu", profiler_cost),
    "estimate": ("estimate_*", estimate),
    "networks": ("networks", networks),
    "fits": ("networks", words.fits),
    "speed": ("throughput_*", words.speed),
    "networks-measured": ("networks_cuda", networks_measured),
    "cuda-steps": ("cuda-*", cuda_words.steps),
    "cuda-trained": ("cuda-*", cuda_words.trained),
    "cuda-others": ("cuda-*", cuda_words.others),
    "cuda-tests": ("cuda-*", cuda_words.tests),
    "cuda-speed": ("cuda-*", cuda_words.speed),
    "lightning-suite": ("lightning_suite", lightning_suite),
}
MODULES = {
    "memory_cpu": "memory",
    "accuracy_cpu": "accuracy",
    "profiler_cpu": "profiler",
    "estimate_*": "estimate",
    "ablation_cpu": "ablation",
    "throughput_*": "throughput",
    "networks_cuda": "networks --measure",
    "cuda-*": "cuda",
}


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
