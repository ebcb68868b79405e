"""What the memory profiler costs, and whether its peak is right: beside torch's own tracker, on the CPU.

    python -m benchmarks.profiler
    python -m benchmarks.profiler --quick   # little of everything, to see that it runs; says nothing

- `peak`: the peak of a training step by `MemoryRecorder` and by `torch.distributed._tools.mem_tracker.MemTracker`,
  each against the allocator's own: all its events since before the network was built, added up.
- `cost`: a training step's time with the recorder on, and with it there but done, by the time with none.
- `replay`: seconds and memory for turning events into a report, for a hundred thousand and a million of them.
"""

import argparse
import json
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks.common import MISSED, Timing, apart, environment, result_path, write_result
from lightning_mpt.profiler import Category, MemoryRecorder, MemoryReport
from lightning_mpt.profiler.recording import Claim, Event, Mark, Recording, Window

TARGETS = {"peak_error": 0.01, "recording": 1.25, "not_recording": 1.01, "replay_s": 60.0, "replay_bytes": 2 * 2**30}
EVENTS = (100_000, 1_000_000)
STEPS = 3


class LastStep(nn.Module):
    """A classifier over the last output of an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(128, 256, num_layers=2, batch_first=True)
        self.head = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def convnet() -> nn.Module:
    """Three convolutions, each with BatchNorm, over 32 x 32 images, all at full size."""
    layers: list[nn.Module] = []
    for incoming, outgoing in ((3, 64), (64, 64), (64, 64)):
        layers += [nn.Conv2d(incoming, outgoing, 3, padding=1), nn.BatchNorm2d(outgoing), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mlp() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 1024), nn.GELU(), nn.Linear(1024, 10))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convnet": (convnet, (64, 3, 32, 32)),
    "LSTM": (LastStep, (64, 64, 128)),
    "MLP": (mlp, (512, 256)),
}
"""A network, and the shape of its batch."""


class Training:
    """A network under AdamW on one batch, ready to step."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        build, shape = NETWORKS[name]
        self.module = build()
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-3)
        self.inputs = torch.randn(shape)
        self.targets = torch.randint(10, shape[:1])

    def step(self) -> None:
        loss = nn.functional.cross_entropy(self.module(self.inputs), self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def allocators_peak(name: str) -> int:
    """The highest sum of the allocator's events in the last of three steps. The network is built on its record."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        training = Training(name)
        for _ in range(STEPS - 1):
            training.step()
        with torch.profiler.record_function("the last step"):
            training.step()
    assert profiler.profiler is not None
    assert profiler.profiler.kineto_results is not None
    changes: list[tuple[int, int]] = []
    span = (0, 0)
    pending = list(profiler.profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.name == "the last step":
            span = (event.start_time_ns, event.end_time_ns)
        elif event.name == "[memory]":
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    alive = peak = 0
    for time_ns, size in sorted(changes, key=lambda change: change[0]):
        if time_ns >= span[0]:
            peak = max(peak, alive)
        alive += size
        if span[0] <= time_ns <= span[1]:
            peak = max(peak, alive)
    return peak


def recorders_report(name: str) -> MemoryReport:
    """What MemoryRecorder says of the last of three steps."""
    training = Training(name)
    with MemoryRecorder(training.module, training.optimizer, warmup_steps=STEPS - 1, steps=1) as recorder:
        for _ in range(STEPS):
            training.step()
            recorder.step()
    return recorder.report


def trackers_peak(name: str) -> int:
    """What torch's MemTracker says of three steps."""
    from torch.distributed._tools.mem_tracker import MemTracker

    training = Training(name)
    tracker = MemTracker()
    tracker.track_external(training.module, training.optimizer, training.inputs, training.targets)
    with tracker:
        for _ in range(STEPS):
            training.step()
            tracker.reset_mod_stats()  # it refuses a second forward pass otherwise
    peak: int = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    return peak


def measure_peak(name: str) -> dict[str, Any]:
    """All three peaks of a network, and the errors of two against the first."""
    truth, report, tracked = allocators_peak(name), recorders_report(name), trackers_peak(name)
    return {
        "network": name,
        "allocator_bytes": truth,
        "recorder_bytes": report.peak_bytes,
        "recorder_error": report.peak_bytes / truth - 1,
        "unattributed_share": report.categories[Category.UNATTRIBUTED] / report.peak_bytes,
        "tracker_bytes": tracked,
        "tracker_error": tracked / truth - 1,
    }


def measure_cost(name: str, rounds: int) -> dict[str, Any]:
    """What recording adds to a network's step time."""

    def training() -> tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]:
        made = Training(name)
        return made.module, made.optimizer, made.step

    return {"network": name, **step_cost(training, rounds)}


def step_cost(
    training: Callable[[], tuple[nn.Module, torch.optim.Optimizer, Callable[[], None]]],
    rounds: int,
    synchronize: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Step times, in turn: without a recorder, with one that records, and with one that is done; and the ratios.

    Args:
        training: makes a module, its optimizer and what takes a step.
        rounds: how many steps of each are timed.
        synchronize: waits for the device.
    """
    trainings = {kind: training() for kind in ("without", "recording", "not_recording")}
    seconds: dict[str, list[float]] = {kind: [] for kind in trainings}

    def timed(kind: str, after: Callable[[], None]) -> None:
        synchronize()
        start = time.perf_counter()
        trainings[kind][2]()
        after()
        synchronize()
        seconds[kind].append(time.perf_counter() - start)

    for _, _, step in trainings.values():
        step()
    done = MemoryRecorder(*trainings["not_recording"][:2], steps=1)
    with done:
        trainings["not_recording"][2]()
        done.step()
        for _ in range(rounds):
            timed("without", lambda: None)
            timed("not_recording", done.step)
            # A recording of its own each round, so that the other two are timed with nothing on.
            recorder = MemoryRecorder(*trainings["recording"][:2])
            with recorder:
                timed("recording", recorder.step)
    timings = {kind: Timing.of(taken) for kind, taken in seconds.items()}
    return {
        "timings": {kind: timing._asdict() for kind, timing in timings.items()},
        "recording": timings["recording"].median_s / timings["without"].median_s,
        "not_recording": timings["not_recording"].median_s / timings["without"].median_s,
    }


def made_recording(count: int) -> Recording:
    """A recording of `count` events: blocks that are born and freed, claimed in part, in ten steps."""
    rng = random.Random(0)
    recording = Recording("cuda:0", 1000)
    free = list(range(1, 20_001))
    alive: list[int] = []
    now = 0
    for index in range(count):
        now += 1000
        if index % (count // 30 + 1) == 0:
            recording.phases.append(Mark(now, ("forward", "backward", "optimizer_step")[len(recording.phases) % 3]))
        if alive and (not free or rng.random() < 0.5):
            address = alive.pop(rng.randrange(len(alive)))
            free.append(address)
            recording.events.append(Event(now, address << 20, 0, 0))
        else:
            address = free.pop()
            alive.append(address)
            size = 512 * rng.randrange(1, 4096)
            recording.events.append(Event(now, address << 20, size, size - rng.randrange(512)))
            recording.modules.append(Mark(now, f"layer.{index % 64}"))
            if rng.random() < 0.5:
                claim = Claim(now + 1, address << 20, size, Category.ACTIVATIONS, "layer", (size,), "float16")
                recording.claims.append(claim)
    recording.windows.append(Window(0, now + 1, None))
    return recording


def replay(count: int) -> dict[str, Any]:
    """Turn `count` events into a report, in this process: a fresh one's peak is the memory that it takes."""
    recording = made_recording(count)
    start = time.perf_counter()
    report = MemoryReport.from_recording(recording)
    seconds = time.perf_counter() - start
    assert sum(report.categories.values()) == report.peak_bytes
    return {"events": count, "seconds": seconds, "process_peak_bytes": process_peak_bytes()}


def process_peak_bytes() -> int:
    """The most memory that this process has held."""
    # Not getrusage: its figure is that of the parent where that was larger when it started this process.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def missed(result: dict[str, Any]) -> list[str]:
    """A line for every target that was missed."""
    lines = [
        f"{row['network']}: peak off by {row['recorder_error']:.2%}"
        for row in result["peak"]
        if abs(row["recorder_error"]) > TARGETS["peak_error"] or row["unattributed_share"] > TARGETS["peak_error"]
    ]
    for row in result["cost"]:
        lines += [
            f"{row['network']}: {kind.replace('_', ' ')} takes {row[kind]:.3f}x, target {TARGETS[kind]}x"
            for kind in ("recording", "not_recording")
            if row[kind] > TARGETS[kind]
        ]
    for row in result["replay"]:
        if row["seconds"] > TARGETS["replay_s"] or row["process_peak_bytes"] > TARGETS["replay_bytes"]:
            lines.append(f"{row['events']:,} events take {row['seconds']:.1f} s, {row['process_peak_bytes']:,} bytes")
    return lines


def show(result: dict[str, Any], console: Console) -> None:
    """Print the tables."""
    peaks = Table("network", "allocator", "ours", "MemTracker", title="Peak of a step, and its error")
    for row in result["peak"]:
        peaks.add_row(
            row["network"],
            f"{row['allocator_bytes']:,}",
            f"{row['recorder_error']:+.2%}",
            f"{row['tracker_error']:+.2%}",
        )
    costs = Table("network", "recording", "not recording", title="Step time, by that without a recorder")
    for row in result["cost"]:
        costs.add_row(row["network"], f"{row['recording']:.3f}", f"{row['not_recording']:.3f}")
    replays = Table("events", "seconds", "MiB", title="From events to a report")
    for row in result["replay"]:
        replays.add_row(f"{row['events']:,}", f"{row['seconds']:.1f}", f"{row['process_peak_bytes'] / 2**20:.0f}")
    console.print(peaks, costs, replays)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the JSON. Returns MISSED where a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiler", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 30)")
    parser.add_argument("--quick", action="store_true", help="little of everything, to see that it runs")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/profiler_cpu.json)")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        print("\n" + json.dumps(replay(arguments.child)))
        return 0
    warnings.filterwarnings("ignore", message="Module is put on CPU")  # MemTracker's own
    quick = arguments.quick
    rounds = arguments.rounds or (3 if quick else 30)
    networks, events = (("MLP",), EVENTS[:1]) if quick else (NETWORKS, EVENTS)
    where = environment("benchmarks.profiler", ["--rounds", str(rounds), *["--quick"] * quick])
    console = Console()
    result: dict[str, Any] = {
        "targets": TARGETS,
        "peak": [measure_peak(name) for name in track(networks, "peaks", console=console)],
        "cost": [measure_cost(name, rounds) for name in track(networks, "cost", console=console)],
        "replay": [apart("profiler", str(count), limit_s=600) for count in track(events, "replay", console=console)],
    }
    show(result, console)
    write_result(arguments.out or result_path("profiler_cpu", quick=quick), {"environment": where, **result})
    lines = [] if quick else missed(result)
    for line in lines:
        console.print(f"[red]missed: {line}")
    return MISSED if lines else 0


if __name__ == "__main__":
    sys.exit(main())
