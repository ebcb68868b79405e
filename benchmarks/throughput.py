"""How fast it trains: steps, tokens and images a second through the Lightning Trainer, precision by precision.

    python -m benchmarks.throughput                          # on the GPU where there is one, else on the CPU
    python -m benchmarks.throughput --quick                  # two steps of each, to see that it runs; says nothing
    python -m benchmarks.throughput --network "GPT-2 1.5B"   # some of the networks

The contenders take turns, round by round. In its turn one is built anew, trained for a few steps and let go, so that
there is never more than one in memory, and a machine that slows down for a while slows all of them. A step lasts from
the end of the step before to its own end, with all that the Trainer does in between, and nothing waits for the device
to learn when that was. The batch lies on the device from the beginning: loading data is not what is measured. Where
the memory does not suffice, the table says so, and the other contenders go on.
"""

import argparse
import gc
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch.utils.data import DataLoader, default_collate

from benchmarks import network_zoo
from benchmarks.common import MISSED, SILENT, Timing, earlier, environment, result_path, slug, write_result
from benchmarks.memory import build
from benchmarks.recorded import Step
from benchmarks.step_clock import StepClock
from examples.train_gpt import multiplies_bf16, quiet_lightning
from lightning_mpt.precisions import trainer_arguments

OURS = ("mpt-bf16-true", "mpt-bf16-true:compact")
CONTENDERS = {
    "cpu": ("32-true", "bf16-mixed", "bf16-true", *OURS),
    "cuda": ("32-true", "16-mixed", "bf16-mixed", "bf16-true", "mpt-16-true", "mpt-16-true:compact", *OURS),
}
"""In fp16 nobody trains on a CPU: torch has no fast convolutions of it there."""
GOAL = {"cpu": ("mpt-bf16-true", "bf16-mixed"), "cuda": ("mpt-16-true", "16-mixed")}
"""Which of ours is held against which of Lightning's; the others are told beside it."""
OK, OUT_OF_MEMORY = "ok", "out of memory"
WARMUP_STEPS = 3


class Network(NamedTuple):
    """What is trained: a network of `benchmarks.memory` by its shape, or ResNet-50, and how long."""

    model: str
    shape: dict[str, int]
    batch_size: int
    rounds: int
    steps: int
    """Timed steps of a contender in a round."""
    goal: float | None = None
    """How many times as fast as Lightning's mixed precision ours is to be."""

    @property
    def unit(self) -> str:
        return "tokens" if self.model == "gpt2" else "images"

    @property
    def units_per_step(self) -> int:
        return self.batch_size * self.shape.get("seq_len", 1)


ON_SLOW_CPUS = {
    "GPT-2": Network("gpt2", {"layers": 4, "width": 128, "vocab_size": 512, "seq_len": 64}, 4, 6, 5, goal=1.0),
    "ResNet": Network("resnet", {"width": 64, "image_size": 32}, 32, 6, 5, goal=1.0),
}
"""So small that two cores without instructions for bf16 take seconds; there a step is mostly calls."""
ON_CPUS = {
    "GPT-2": Network("gpt2", {"layers": 4, "width": 256, "vocab_size": 512, "seq_len": 256}, 8, 6, 5, goal=1.0),
    "ResNet": Network("resnet", {"width": 128, "image_size": 64}, 48, 6, 5, goal=1.0),
}
NETWORKS = {
    "cpu": ON_CPUS if multiplies_bf16() else ON_SLOW_CPUS,
    "cuda": {
        "GPT-2 124M": Network(
            "gpt2", {"layers": 12, "width": 768, "vocab_size": 50257, "seq_len": 1024}, 8, 5, 10, goal=1.0
        ),
        "GPT-2 1.5B": Network(
            "gpt2", {"layers": 48, "width": 1600, "vocab_size": 50257, "seq_len": 1024}, 4, 3, 5, goal=1.15
        ),
        "ResNet-50": Network("resnet50", {"image_size": 224}, 128, 5, 10),
    },
}


def built(network: Network) -> tuple[Step, Any]:
    """The module that trains the network, and a batch of its data."""
    if network.model == "resnet50":
        resnet = network_zoo.networks()["ResNet-50"]
        return resnet.module(), resnet.batch(network.batch_size)
    net, sample = build(network.model, network.shape)
    return Step(net), default_collate([sample() for _ in range(network.batch_size)])


def train(network: Network, precision: str, device: str, steps: int) -> dict[str, Any]:
    """Train for a few steps: the seconds that each took after the warm-up, and how many of all were skipped."""
    L.seed_everything(0, verbose=False)
    with torch.device(device):
        module, batch = built(network)
    clock = StepClock()
    count = WARMUP_STEPS + steps
    trainer = L.Trainer(
        accelerator=device,
        devices=1,
        max_epochs=1,
        gradient_clip_val=1.0,
        callbacks=[clock],
        **SILENT,
        **trainer_arguments(precision),
    )
    trainer.fit(module, DataLoader([batch] * count, batch_size=None))
    taken = next(iter(trainer.optimizers[0].state.values()))["step"]
    return {
        "library": type(module.net).__module__.partition(".")[0],
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "seconds": clock.seconds()[-steps:],
        "skipped_steps": count - int(taken),
    }


class Contest:
    """The turns of all contenders on a network.

    Args:
        network: what to train.
        device: `cpu` or `cuda`.
        quick: a single round of two steps.
    """

    def __init__(self, network: Network, device: str, *, quick: bool = False) -> None:
        self.network, self.device = network, device
        self._rounds, self._steps = (1, 2) if quick else (network.rounds, network.steps)
        self._turns: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS[device]}
        self._out_of_memory: set[str] = set()

    def __len__(self) -> int:
        return self._rounds * len(self._turns)

    def run(self) -> Iterator[str]:
        """Take all turns; gives each contender's name before its turn."""
        for _ in range(self._rounds):
            for precision, turns in self._turns.items():
                yield precision
                if precision in self._out_of_memory:
                    continue
                try:
                    turns.append(train(self.network, precision, self.device, self._steps))
                except torch.OutOfMemoryError:
                    self._out_of_memory.add(precision)
                # Only now, where the error is gone, and with it the frames that hold the network.
                gc.collect()
                if self.device == "cuda":
                    torch.cuda.empty_cache()

    def result(self) -> dict[str, Any]:
        """A JSON object: the network, a row for each contender, and the goal."""
        ours, theirs = GOAL[self.device]
        rows = {precision: self._row(precision) for precision in self._turns}
        for row in rows.values():
            if OK == row["status"] == rows[theirs]["status"]:
                row["times_the_reference"] = rows[theirs]["median_s"] / row["median_s"]
        reached = rows[ours].get("times_the_reference")
        goal = self.network.goal
        made = next((turns[0] for turns in self._turns.values() if turns), {})
        return {
            **self.network._asdict(),
            "rounds": self._rounds,
            "steps": self._steps,
            "unit": self.network.unit,
            "library": made.get("library"),
            "parameters": made.get("parameters"),
            "ours": ours,
            "reference": theirs,
            "goal_met": None if goal is None or reached is None else reached >= goal,
            "rows": list(rows.values()),
        }

    def _row(self, precision: str) -> dict[str, Any]:
        turns = self._turns[precision]
        if precision in self._out_of_memory:
            return {"precision": precision, "status": OUT_OF_MEMORY}
        timing = Timing.of([seconds for turn in turns for seconds in turn["seconds"]])
        return {
            "precision": precision,
            "status": OK,
            **timing._asdict(),
            "steps_per_s": 1 / timing.median_s,
            "units_per_s": self.network.units_per_step / timing.median_s,
            "skipped_steps": max(turn["skipped_steps"] for turn in turns),
        }


def show(networks: dict[str, dict[str, Any]], console: Console) -> None:
    """Print a table for each network."""
    for name, found in networks.items():
        goal = "" if found["goal"] is None else f"; {found['ours']} is to reach {found['goal']:g}"
        table = Table(title=f"{name}, {found['parameters'] or 0:,} parameters: times {found['reference']}{goal}")
        table.add_column("precision", no_wrap=True)
        for heading in ("step, ms (p20 to p80)", "steps/s", f"{found['unit']}/s", "times", "skipped"):
            table.add_column(heading, justify="right")
        for row in found["rows"]:
            if row["status"] != OK:
                table.add_row(row["precision"], row["status"])
                continue
            times = row.get("times_the_reference")
            table.add_row(
                row["precision"],
                "{:.0f} ({:.0f} to {:.0f})".format(*(1e3 * row[name] for name in ("median_s", "p20_s", "p80_s"))),
                f"{row['steps_per_s']:.2f}",
                f"{row['units_per_s']:,.0f}",
                "" if times is None else f"{times:.2f}",
                str(row["skipped_steps"]),
            )
        console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the JSON after each network. Returns MISSED where a goal was missed."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=description)
    parser.add_argument("--accelerator", choices=tuple(NETWORKS), help="default: cuda where there is a GPU")
    parser.add_argument("--network", nargs="+", metavar="NAME", help="some of the networks (default: all)")
    parser.add_argument("--quick", action="store_true", help="one round of two steps: to see that it runs")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/throughput_*.json)")
    arguments = parser.parse_args(argv)
    device = arguments.accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
    networks = NETWORKS[device]
    chosen = arguments.network or list(networks)
    if unknown := set(chosen) - set(networks):
        parser.error(f"--network {unknown.pop()!r} is not one of {', '.join(map(repr, networks))}")

    where = environment("benchmarks.throughput")
    on = slug(where["gpu"]["name"]) if device == "cuda" else "cpu"
    out = arguments.out or result_path(f"throughput_{on}", quick=arguments.quick)
    found = kept(out, where, quick=arguments.quick)
    console = Console()
    quiet_lightning()
    contests = {name: Contest(networks[name], device, quick=arguments.quick) for name in chosen}
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=sum(map(len, contests.values())))
        for name, contest in contests.items():
            for precision in contest.run():
                progress.update(bar, description=f"{name}, {precision}")
                progress.advance(bar)
            found[name] = contest.result()
            found = {one: found[one] for one in networks if one in found}
            options = ["--quick"] if arguments.quick else []
            if set(found) != set(networks):
                options += ["--network", *(f'"{one}"' if " " in one else one for one in found)]
            where["command"] = " ".join(["python -m benchmarks.throughput --accelerator", device, *options])
            write_result(out, {"environment": where, "quick": arguments.quick, "networks": found})
    show({name: found[name] for name in chosen}, console)
    missed = [name for name in chosen if found[name]["goal_met"] is False and not arguments.quick]
    for name in missed:
        console.print(f"[red]missed: {found[name]['ours']} is slower than the goal on {name}")
    return MISSED if missed else 0


def kept(path: Path, where: Mapping[str, Any], *, quick: bool) -> dict[str, Any]:
    """The networks in an earlier result of the same commit and kind."""
    result = earlier(path, where)
    found: dict[str, Any] = {} if result is None or result["quick"] != quick else result["networks"]
    return found


if __name__ == "__main__":
    sys.exit(main())
