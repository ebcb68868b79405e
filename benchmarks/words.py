"""Kept results in a sentence or two each, for the pages that have room for no table."""

from collections.abc import Sequence
from typing import Any

EXACT = "mpt exact (split)"


def step_range(result: dict[str, Any]) -> str:
    """In words: what a step of ours costs on a CPU, by masters."""

    def span(case: str) -> str:
        large = [row for row in result["time"] if row["device"] == "cpu" and row["case"] == case]
        times = [row["times_the_reference"] for row in large if 100 <= row["tensors"] < 200]  # the GPTs
        return f"{min(times):.1f} to {max(times):.1f}"

    small = max(row["times_the_reference"] for row in result["time"] if row["case"] == EXACT and row["device"] == "cpu")
    return (
        f"A step takes {span(EXACT)} times torch's fused FP32 AdamW (`float32` masters: "
        f"{span('mpt float32 masters')}; up to {small:.1f} over many small tensors), a few per cent of a training\n"
        "step. `compact` takes many times more: it trades time on a CPU for memory. The update for CPUs is written\n"
        "to be right, the fast one is for the GPU." + source(result)
    )


def verdicts(result: dict[str, Any]) -> str:
    """In how many tasks each precision ended worse than every seed of FP32 did."""
    said: dict[str, list[str]] = {}
    for task in result["summary"]:
        for row in task["rows"]:
            if row["verdict"]:
                said.setdefault(row["precision"], []).append(row["verdict"])
    counts = ", ".join(
        f"`{name}` {sum(one in ('worse', 'diverged') for one in of)} of {len(of)}" for name, of in said.items()
    )
    return f"Tasks that end, on average, above the highest of FP32's seeds: {counts}."


def preset_cost(result: dict[str, Any]) -> str:
    """In words: what each preset costs the example in accuracy."""
    (task,) = [task for task in result["summary"] if task["task"] == "gpt"]
    rows = {row["precision"]: row for row in task["rows"]}
    presets = {"exact": "mpt-bf16-true", "compact": "mpt-bf16-true:compact", "minimal": "mpt-bf16-true:minimal"}
    costs = ", ".join(f"`{name}` {rows[row]['mean_difference']:+.4f}" for name, row in presets.items())
    fp32 = rows["32-true"]
    spread = fp32["highest"] - fp32["lowest"]
    return (
        f"On the example (`nano`, {task['steps']} steps on a CPU, {fp32['seeds']} seeds) they end at {costs}\n"
        f"nats per byte from FP32, whose own seeds are {spread:.4f} apart; `minimal` against FP32 without clipping."
        + source(result)
    )


def fits(result: dict[str, Any]) -> str:
    """The largest GPT-2 that fits, by precision, as estimated."""
    memory = "80 GB"
    sizes = {row["precision"]: row["largest_model"][memory]["parameters"] / 1e9 for row in result["largest_models"]}
    fp32 = sizes.pop("32-true")
    others = ", ".join(f"{size:.1f} under `{name}`" for name, size in sizes.items())
    return (
        f"In {memory}, at 8 x 1024 tokens, a GPT-2 may have {fp32:.1f} billion parameters in FP32, {others}:\n"
        "estimated, not measured." + source(result)
    )


def speed(result: dict[str, Any]) -> str:
    """Training steps a second through the Trainer, ours beside Lightning's mixed precision."""
    said = []
    for name, network in result["networks"].items():
        times = {row["precision"]: row.get("times_the_reference") for row in network["rows"]}
        if (ours := times.get(network["ours"])) is not None:
            said.append(f"{ours:.2f} times as many on {name}")
    network = next(iter(result["networks"].values()))
    return (
        f"Training steps a second through the Trainer, `{network['ours']}` beside Lightning's "
        f"`{network['reference']}`: {', '.join(said)}." + source(result)
    )


def source(result: dict[str, Any]) -> str:
    """Where a number is from; and, where networks were kept from runs before, where those are."""
    kept: dict[str, list[str]] = {}
    rows = [*result["networks"], *result.get("largest_models", [])] if isinstance(result.get("networks"), list) else []
    for row in rows:
        names = kept.setdefault(_run(row["environment"]), []) if "environment" in row else []
        if row["network"] not in names:
            names.append(row["network"])
    others = "".join(f"; {', '.join(names)}: {run}" for run, names in kept.items())
    return f"\n\n{_run(result['environment'])}{others}"


def measured_by(result: dict[str, Any]) -> str:
    """Which run was measured, where it is another than the result's own."""
    return f"; measured: {_run(result['measured_by'])}" if "measured_by" in result else ""


def _run(where: dict[str, Any]) -> str:
    """Device, version, commit, day and command."""
    device = where["gpu"]["name"] if where["gpu"] else f"{where['cpu']}, {where['cpu_threads']} threads"
    return (
        f"{device}, torch {where['versions']['torch']}, commit {where['commit'][:10]}, {where['date'][:10]}: "
        f"`{where['command']}`"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
