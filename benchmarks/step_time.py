"""Time and memory of a step: `MasterAdamW` over half weights in its formats against FP32 `torch.optim.AdamW`.

    python -m benchmarks.step_time                      # on the CPU, and on CUDA where there is one
    python -m benchmarks.step_time --parameters 1e7     # another size
    python -m benchmarks.step_time --quick              # little of everything, to see that it runs; says nothing

Time: all cases in turn, round by round, in one process. Each case reads and writes a known number of bytes per
parameter (FP32 AdamW 28, ours 28 to 12), so its rate is told as a share of a plain copy's, measured in the same rounds.
The same is done for ten million parameters in 10, 1000 and 5000 tensors, since every tensor has a price.

Memory: what is held per parameter after a step (weight, gradient, master, moments), and what a step allocates on top,
as a share of that, from the CPU allocator's own events. Scratch that the optimizer keeps between steps counts too. In
the case `one embedding` nearly all parameters are one tensor, so that an update of a whole tensor at a time would show.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import (
    MISSED,
    cuda_clock,
    environment,
    gpt_shapes,
    interleave,
    result_path,
    wall_clock,
    write_result,
)
from benchmarks.contenders import UNDER_AUTOCAST, Step, autocast_step, parameters, torch_adamw, total
from lightning_mpt import PRESETS, MasterAdamW

REFERENCE = "torch fused, fp32"
TARGET_TIME = 2.0
"""On CPU a step may take this many times the reference's."""
TARGET_EXTRA = 0.05
"""A step may allocate this share of what is held."""
TARGET_HELD = 0.01
"""What is held may differ by this share from what the table in the README says."""
COPY = "copy"

Build = Callable[[list[tuple[int, ...]], str], torch.optim.Optimizer]


class Case(NamedTuple):
    """A way to step, and the bytes per parameter that it must read and write, and that it holds."""

    build: Build
    moved_bytes: float
    held_bytes: float


def ours(**options: Any) -> Build:
    """bf16 parameters under ours."""
    return lambda shapes, device: MasterAdamW(parameters(shapes, torch.bfloat16, device), lr=1e-3, **options)


class Released(MasterAdamW):
    """Compact storage, stepped as gradient release does: a gradient comes, is used, and goes."""

    def __init__(self, shapes: list[tuple[int, ...]], device: str) -> None:
        super().__init__(parameters(shapes, torch.bfloat16, device), lr=1e-3, **PRESETS["compact"])
        self.zero_grad()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        scale = torch.ones(())
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, 1e-3)
                self.step_some([parameter], group, scale)
                parameter.grad = None


def moved(master_bytes: float, moment_bytes: float) -> float:
    """Bytes per parameter: master and moments read and written, the gradient read, the half weight written.

    A master that is split takes the half weight to be read too.
    """
    return 2 * (master_bytes + moment_bytes) + 2 + 2 + (0 if master_bytes == 4 else 2)


CASES = {
    REFERENCE: Case(partial(torch_adamw, fused=True), 28, 16),
    "torch foreach, fp32": Case(partial(torch_adamw, foreach=True), 28, 16),
    "mpt exact (split)": Case(ours(), moved(2, 8), 14),
    "mpt float32 masters": Case(ours(master_weights="float32"), moved(4, 8), 16),
    "mpt bfloat16 moments": Case(ours(optimizer_state="bfloat16"), moved(2, 4), 10),
    "mpt compact (split8, 8bit)": Case(ours(**PRESETS["compact"]), moved(1, 2.0625), 7.0625),
}
MEMORY_CASES = {
    **{name: CASES[name] for name in (REFERENCE, "mpt exact (split)", "mpt compact (split8, 8bit)")},
    "mpt minimal (and released)": Case(lambda shapes, device: Released(shapes, device), 0, 5.0625),
}
TENSORS = (10, 1000, 5000)
MEMORY_MODELS = ("GPT, 10M", "GPT, 100M", "one embedding")


def shapes_of(count: float) -> list[tuple[int, ...]]:
    """The shapes of a GPT of about `count` parameters, its embedding included."""
    width = 256 if count < 3e7 else 768
    vocab_size = 8192 if width == 256 else 50257
    layers = max(1, round((count - vocab_size * width) / (12 * width * width)))
    return gpt_shapes(width, layers, vocab_size)


def measure_time(shapes: list[tuple[int, ...]], device: str, rounds: int) -> list[dict[str, Any]]:
    """A row for every case: seconds per step, its rate, and both against the others."""
    count = total(shapes)
    source, target = torch.empty(2, 4 * count, dtype=torch.uint8, device=device).random_(255)
    steps: dict[str, Step] = {COPY: lambda: target.copy_(source)}
    steps |= {name: case.build(shapes, device).step for name, case in CASES.items()}
    steps[UNDER_AUTOCAST] = autocast_step(shapes, device)
    moved_bytes = {**{name: case.moved_bytes for name, case in CASES.items()}, UNDER_AUTOCAST: 28 + 8 + 6}
    timings = interleave(steps, rounds=rounds, warmup=3, clock=cuda_clock if device == "cuda" else wall_clock)
    copy_rate = 2 * source.numel() / timings[COPY].median_s
    rows = []
    for name, moved_here in moved_bytes.items():
        rate = moved_here * count / timings[name].median_s
        rows.append(
            {
                "device": device,
                "parameters": count,
                "tensors": len(shapes),
                "case": name,
                **timings[name]._asdict(),
                "times_the_reference": timings[name].median_s / timings[REFERENCE].median_s,
                "moved_bytes_per_parameter": moved_here,
                "bytes_per_s": rate,
                "share_of_copy": rate / copy_rate,
            }
        )
    return rows


def even_shapes(count: int, tensors: int) -> list[tuple[int, ...]]:
    """`count` parameters in as many tensors as are wanted, of one size."""
    return [(count // tensors,)] * tensors


def measure_memory(build: Build, shapes: list[tuple[int, ...]]) -> tuple[int, int]:
    """Bytes held after a first step, gradients included, and what a second one allocates on top.

    Everything is built and stepped within one recording, so that every byte alive is on the CPU allocator's record.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        optimizer = build(shapes, "cpu")
        optimizer.step()
        with torch.profiler.record_function("measured step"):
            optimizer.step()
    events: list[tuple[int, int]] = []
    spans: list[tuple[int, int]] = []
    stack = list(profiler.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.name == "measured step":
            spans.append((event.start_time_ns, event.end_time_ns))
        elif event.name == "[memory]":
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    ((start, end),) = spans
    alive, held, peak = 0, 0, 0
    for time_ns, size in sorted(events, key=lambda event: event[0]):
        alive += size
        if time_ns < start:
            held = peak = alive
        elif time_ns <= end:
            peak = max(peak, alive)
    return held, peak - held


def run(
    counts: Sequence[float],
    devices: Sequence[str],
    rounds: int,
    progress: Console,
    tensors: Sequence[int] = TENSORS,
    memory_models: Sequence[str] = MEMORY_MODELS,
) -> dict[str, Any]:
    """Measure everything. Returns JSON: `time`, rows by device, model and case; `memory`, by model and case."""
    time_rows: list[dict[str, Any]] = []
    for device in devices:
        models = [shapes_of(count) for count in counts] + [even_shapes(10_000_000, number) for number in tensors]
        for shapes in track(models, f"step time on {device}", console=progress):
            time_rows += measure_time(shapes, device, rounds)
    memory_rows = []
    makers: dict[str, Callable[[], list[tuple[int, ...]]]] = {
        "GPT, 10M": lambda: shapes_of(1e7),
        "GPT, 100M": lambda: shapes_of(1e8),
        "one embedding": lambda: [(50257, 768), *gpt_shapes(64, 1)],
    }
    for model in track(memory_models, "memory of a step", console=progress):
        shapes = makers[model]()
        for name, case in MEMORY_CASES.items():
            held, extra = measure_memory(case.build, shapes)
            memory_rows.append(
                {
                    "model": model,
                    "parameters": total(shapes),
                    "case": name,
                    "held_bytes": held,
                    "held_bytes_per_parameter": held / total(shapes),
                    "expected_bytes_per_parameter": case.held_bytes,
                    "extra_bytes": extra,
                    "extra_share": extra / held,
                }
            )
    return {
        "targets": {"times_the_reference_on_cpu": TARGET_TIME, "extra_share": TARGET_EXTRA, "held": TARGET_HELD},
        "time": time_rows,
        "memory": memory_rows,
    }


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    models: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in result["time"]:
        models.setdefault((row["device"], row["parameters"], row["tensors"]), []).append(row)
    for (device, count, tensors), rows in models.items():
        title = f"A step of {count:,} parameters in {tensors:,} tensors on {device}"
        table = Table("step", "median ms", "p20 to p80", "x fused FP32", "of a copy's rate", title=title)
        for row in rows:
            table.add_row(
                row["case"],
                f"{row['median_s'] * 1e3:.2f}",
                f"{row['p20_s'] * 1e3:.2f} to {row['p80_s'] * 1e3:.2f}",
                f"{row['times_the_reference']:.2f}",
                f"{row['share_of_copy']:.0%}",
            )
        console.print(table)
    memory = Table("model", "step", "held, B/param.", "a step adds", title="Memory of a step")
    for row in result["memory"]:
        memory.add_row(row["model"], row["case"], f"{row['held_bytes_per_parameter']:.2f}", f"{row['extra_share']:.2%}")
    console.print(memory)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the JSON. Returns MISSED where a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=float, nargs="+", help="model sizes (default: 1e7 1e8)")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 15)")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/step_time.json)")
    arguments = parser.parse_args(argv)
    quick = arguments.quick
    counts = arguments.parameters or ([1e6] if quick else [1e7, 1e8])
    rounds = arguments.rounds or (3 if quick else 15)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    options = ["--parameters", *(f"{count:g}" for count in counts), "--rounds", str(rounds)]
    where = environment("benchmarks.step_time", options + ["--quick"] * quick)
    console = Console()
    some = {"tensors": TENSORS[:1], "memory_models": MEMORY_MODELS[:1]} if quick else {}
    result = run(counts, devices, rounds, console, **some)
    show(result, console)
    write_result(arguments.out or result_path("step_time", quick=quick), {"environment": where, **result})
    if quick:
        return 0
    missed = [
        f"{row['case']} takes {row['times_the_reference']:.2f}x for {row['parameters']:,}, target {TARGET_TIME}x"
        for row in result["time"]
        if row["device"] == "cpu" and row["case"] == "mpt exact (split)" and row["times_the_reference"] > TARGET_TIME
    ]
    for row in result["memory"]:
        kept = row["case"] not in (REFERENCE, "mpt minimal (and released)")  # whose step makes its own gradients
        if kept and row["extra_share"] > TARGET_EXTRA:
            missed.append(f"{row['case']} adds {row['extra_share']:.2%}, target {TARGET_EXTRA:.0%}")
        if abs(row["held_bytes_per_parameter"] / row["expected_bytes_per_parameter"] - 1) > TARGET_HELD:
            missed.append(f"{row['case']} holds {row['held_bytes_per_parameter']:.3f} bytes a parameter")
    for line in missed:
        console.print(f"[red]missed: {line}")
    return MISSED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
