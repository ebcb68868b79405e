"""Time and extra memory of a step: `MasterAdamW` over half weights against fused FP32 `torch.optim.AdamW`.

    python -m benchmarks.step_time                      # on the CPU, and on CUDA where there is one
    python -m benchmarks.step_time --parameters 1e7     # another size

Time: all cases in turn, round by round, in one process. Ours reads and writes 26 (`split`) or 28 (`float32`) bytes per
parameter and FP32 AdamW 28, so on a device whose memory is the limit they should take about as long.

Memory: what a step allocates on top of weights, gradients, masters and moments, as a share of those, from the CPU
allocator's own events. Scratch that the optimizer keeps between steps counts too. In the case `one embedding` nearly
all parameters are one tensor, so that an update of a whole tensor at a time would show.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.common import (
    RESULTS,
    Timing,
    cuda_clock,
    environment,
    gpt_shapes,
    interleave,
    wall_clock,
    write_result,
)
from lightning_mpt import MasterAdamW

REFERENCE = "torch fused, fp32"
TARGET_TIME = 2.0
"""On CPU a step may take this many times the reference's."""
TARGET_EXTRA = 0.05
"""A step may allocate this share of the model state: weights, gradients, masters and moments."""
STATE_BYTES = {REFERENCE: 16, "mpt split, bf16": 14, "mpt float32, bf16": 16}

Build = Callable[[list[tuple[int, ...]], str], torch.optim.Optimizer]


def build_reference(shapes: list[tuple[int, ...]], device: str) -> torch.optim.Optimizer:
    """FP32 parameters under torch's fused AdamW."""
    return torch.optim.AdamW(parameters(shapes, torch.float32, device), lr=1e-3, fused=True)


def build_ours(master_weights: str) -> Build:
    """Half parameters under ours."""

    def build(shapes: list[tuple[int, ...]], device: str) -> torch.optim.Optimizer:
        return MasterAdamW(parameters(shapes, torch.bfloat16, device), lr=1e-3, master_weights=master_weights)

    return build


CASES: dict[str, Build] = {
    REFERENCE: build_reference,
    "mpt split, bf16": build_ours("split"),
    "mpt float32, bf16": build_ours("float32"),
}


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str) -> list[torch.nn.Parameter]:
    """Parameters with gradients, of ordinary magnitudes."""
    generator = torch.Generator(device).manual_seed(0)
    made = []
    for shape in shapes:
        parameter = torch.nn.Parameter((0.02 * torch.randn(shape, device=device, generator=generator)).to(dtype))
        parameter.grad = (1e-3 * torch.randn(shape, device=device, generator=generator)).to(dtype)
        made.append(parameter)
    return made


def shapes_of(count: float) -> list[tuple[int, ...]]:
    """The shapes of a GPT of about `count` parameters, its embedding included."""
    width = 256 if count < 3e7 else 768
    vocab_size = 8192 if width == 256 else 50257
    layers = max(1, round((count - vocab_size * width) / (12 * width * width)))
    return gpt_shapes(width, layers, vocab_size)


def measure_time(shapes: list[tuple[int, ...]], device: str, rounds: int) -> dict[str, Timing]:
    """Seconds per step of every case, in turn."""
    steps = {name: build(shapes, device).step for name, build in CASES.items()}
    return interleave(steps, rounds=rounds, warmup=3, clock=cuda_clock if device == "cuda" else wall_clock)


def measure_extra(build: Build, shapes: list[tuple[int, ...]], state_bytes: int) -> int:
    """Bytes alive at the peak of a warm step beyond the model state of `state_bytes`, from the CPU allocator's events.

    Everything is built and stepped within one recording, so that every byte alive is on the record.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
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
    alive, peak = 0, 0
    for time_ns, size in sorted(events, key=lambda event: event[0]):
        alive += size
        if start <= time_ns <= end:
            peak = max(peak, alive)
    return peak - state_bytes


def run(counts: Sequence[float], devices: Sequence[str], rounds: int, progress: Console) -> dict[str, Any]:
    """Measure everything. Returns JSON: `time`, a row per device, size and case; `memory`, a row per model and case."""
    time_rows: list[dict[str, Any]] = []
    for device in devices:
        for count in track(counts, f"step time on {device}", console=progress):
            shapes = shapes_of(count)
            timings = measure_time(shapes, device, rounds)
            for name, timing in timings.items():
                time_rows.append(
                    {
                        "device": device,
                        "parameters": total(shapes),
                        "tensors": len(shapes),
                        "case": name,
                        **timing._asdict(),
                        "times_the_reference": timing.median_s / timings[REFERENCE].median_s,
                    }
                )
    models = {
        "GPT": shapes_of(1e7),
        "one embedding": [(50257, 768), *gpt_shapes(64, 1)],
    }
    memory_rows = []
    for model, shapes in track(models.items(), "memory of a step", console=progress):
        for name, build in CASES.items():
            state_bytes = STATE_BYTES[name] * total(shapes)
            extra = measure_extra(build, shapes, state_bytes)
            memory_rows.append(
                {
                    "model": model,
                    "parameters": total(shapes),
                    "case": name,
                    "state_bytes": state_bytes,
                    "extra_bytes": extra,
                    "extra_share": extra / state_bytes,
                }
            )
    return {
        "targets": {"times_the_reference_on_cpu": TARGET_TIME, "extra_share": TARGET_EXTRA},
        "time": time_rows,
        "memory": memory_rows,
    }


def total(shapes: Sequence[tuple[int, ...]]) -> int:
    """The number of parameters."""
    return sum(torch.Size(shape).numel() for shape in shapes)


def show(result: dict[str, Any], console: Console) -> None:
    """Print both tables."""
    times = Table("device", "parameters", "step", "median ms", "p20 to p80", "times FP32", title="Time of a step")
    for row in result["time"]:
        times.add_row(
            row["device"],
            f"{row['parameters']:,}",
            row["case"],
            f"{row['median_s'] * 1e3:.2f}",
            f"{row['p20_s'] * 1e3:.2f} to {row['p80_s'] * 1e3:.2f}",
            f"{row['times_the_reference']:.2f}",
        )
    memory = Table("model", "parameters", "step", "extra bytes", "of the model state", title="Memory that a step adds")
    for row in result["memory"]:
        memory.add_row(
            row["model"], f"{row['parameters']:,}", row["case"], f"{row['extra_bytes']:,}", f"{row['extra_share']:.2%}"
        )
    console.print(times, memory)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the JSON. Returns 1 where a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_time", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--parameters", type=float, nargs="+", default=[1e7, 1e8], help="model sizes (default: 1e7 1e8)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--out", type=Path, default=RESULTS / "step_time.json", help="where the JSON goes")
    arguments = parser.parse_args(argv)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    options = ["--parameters", *(f"{count:g}" for count in arguments.parameters), "--rounds", str(arguments.rounds)]
    where = environment("benchmarks.step_time", options)
    console = Console()
    result = run(arguments.parameters, devices, arguments.rounds, console)
    show(result, console)
    write_result(arguments.out, {"environment": where, **result})
    slow = [row for row in result["time"] if row["device"] == "cpu" and row["times_the_reference"] > TARGET_TIME]
    large = [row for row in result["memory"] if row["case"] != REFERENCE and row["extra_share"] > TARGET_EXTRA]
    for row in slow:
        console.print(f"[red]missed: {row['case']} takes {row['times_the_reference']:.2f}x, target {TARGET_TIME}x")
    for row in large:
        console.print(f"[red]missed: {row['case']} adds {row['extra_share']:.2%}, target {TARGET_EXTRA:.0%}")
    return 1 if slow or large else 0


if __name__ == "__main__":
    sys.exit(main())
