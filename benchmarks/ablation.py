"""Why each part is there: the example GPT without master weights, without a loss scale, with sums in half.

    python -m benchmarks.ablation            # within ten minutes on one core; may be stopped and continued
    python -m benchmarks.ablation --quick    # a few steps of each, to see that it runs; says nothing

The ablations of *Mixed Precision Training* (Micikevicius et al., arXiv 1710.03740), each taking away one part:

master weights   after every step the FP32 master is set to its half weight. Moments and the update stay FP32, so what
                 is lost is what half weights cannot hold. Counted: the updates that leave the half weight where it was.
loss scale       none, constants from 8 to 32768, and dynamic, in fp16. Counted: gradients that are zero, beside FP32's.
FP32 sums        matrix products summed in half, 16 products at a time (`half_sums.py`), in forward and backward.

All products in half are FP32 products of half numbers, rounded to half (`half_products.py`), on every CPU. A seed draws
initial weights and data. An ablation *shows* where its loss is further above FP32's of the same seeds than the loss of
any complete run is from its own; at this size not every one does, and the table says so.
"""

import argparse
import contextlib
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.ablation_pictures import draw
from benchmarks.common import ROOT, SILENT, earlier, environment, result_path, write_result
from benchmarks.half_products import HalfProducts
from benchmarks.half_sums import HalfSums
from examples.train_gpt import GPTModule, Windows, quiet_lightning, read_standard_library
from lightning_mpt import DynamicLossScale, GradientHistogram, MasterWeightPrecision
from lightning_mpt.exponents import ExponentHistogram

IMAGES = ROOT / "docs" / "images"
SEQ_LEN, BATCH_SIZE, VALIDATION_BATCHES = 64, 16, 20
SIGNIFICANT = {torch.float16: 2048, torch.bfloat16: 256}
"""2 to the number of significant bits. The paper's rule: a weight over this many times its update may stand still; one
over twice as many does."""


@dataclass(frozen=True)
class Case:
    """A way to train, and the part that it has not."""

    name: str
    part: str
    """What is taken away; empty for a complete run."""
    precision: str | None = "16-true"
    """Of `MasterWeightPrecision`; None for FP32."""
    loss_scale: float | str | None = "auto"
    masters: bool = True
    half_sums: bool = False


REFERENCE = Case("FP32", "", None)
CONSTANTS = (8.0, 64.0, 512.0, 4096.0, 32768.0)
CASES = (
    REFERENCE,
    Case("fp16", ""),
    Case("bf16", "", "bf16-true"),
    Case("fp16, no masters", "masters", masters=False),
    Case("bf16, no masters", "masters", "bf16-true", masters=False),
    Case("fp16, no loss scale", "scale", loss_scale=None),
    *(Case(f"fp16, scale {scale:g}", "scale", loss_scale=scale) for scale in CONSTANTS),
    Case("fp16, scale dynamic", "scale", loss_scale="dynamic"),
    Case("fp16, half sums", "sums", half_sums=True),
    Case("bf16, half sums", "sums", "bf16-true", half_sums=True),
)


class Updates(L.Callback):
    """Counts updates that half weights do not hold, in every so many steps; and takes the masters away, if asked."""

    def __init__(self, every_n_steps: int, *, masters: bool) -> None:
        self._every_n_steps = every_n_steps
        self._masters = masters
        self.updates = self.vanished = self.small = 0

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        sampled = trainer.global_step % self._every_n_steps == 0
        self._before = [master.clone() for _, master in _masters(trainer)] if sampled else []

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        for (parameter, master), before in zip(_masters(trainer), self._before, strict=False):
            half, update = parameter.dtype, (master - before).abs()
            moved = update != 0  # of a skipped step nothing has
            self.updates += int(moved.sum())
            self.vanished += int((moved & (master.to(half) == before.to(half))).sum())
            self.small += int((moved & (before.abs() > SIGNIFICANT[half] * update)).sum())
        if not self._masters:
            for parameter, master in _masters(trainer):
                master.copy_(parameter)


def _masters(trainer: L.Trainer) -> Iterator[tuple[Tensor, Tensor]]:
    """Half weights and their masters. Those are written to, so they must be stored in FP32."""
    (optimizer,) = trainer.optimizers
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    plugin = trainer.precision_plugin
    assert isinstance(plugin, MasterWeightPrecision)
    return zip(parameters, plugin.master_params(optimizer), strict=True)


class Losses(L.Callback):
    """The training loss of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


texts = cache(read_standard_library)


def train(case: Case, seed: int, steps: int, picture: Path | None = None) -> dict[str, Any]:
    """One run: its losses, and what was counted. `picture`: where to draw the exponents of its gradients."""
    quiet_lightning()
    L.seed_everything(seed, verbose=False)
    module = GPTModule("nano", seq_len=SEQ_LEN, steps=steps, warmup_steps=max(1, steps // 10))
    training, validation = (
        DataLoader(Windows(text, count=batches * BATCH_SIZE, seq_len=SEQ_LEN, seed=of), batch_size=BATCH_SIZE)
        for text, batches, of in zip(texts(), (steps, VALIDATION_BATCHES), (seed, 1), strict=True)
    )
    every = max(1, steps // 20)
    losses, updates = Losses(), Updates(every, masters=case.masters)
    gradients = GradientHistogram(every, activations=True, plot=picture, console=Console(file=StringIO()))
    callbacks: list[L.Callback] = [losses, gradients]
    plugin = None
    if case.precision is not None:
        # The default grows after 2000 clean steps: in so few it would be a constant.
        moving = DynamicLossScale(growth_interval=max(1, steps // 8))
        scale = moving if case.loss_scale == "dynamic" else case.loss_scale
        plugin = MasterWeightPrecision(case.precision, loss_scale=scale, master_weights="float32")  # type: ignore[arg-type]
        callbacks.append(updates)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        **SILENT,
        num_sanity_val_steps=0,
        plugins=[] if plugin is None else [plugin],
    )
    products = contextlib.nullcontext() if plugin is None else HalfSums() if case.half_sums else HalfProducts()
    with products:
        trainer.fit(module, training, validation)
    kinds = {kind: ExponentHistogram.sum(getattr(gradients, kind).values()) for kind in ("weights", "activations")}
    return {
        "case": case.name,
        "seed": seed,
        "steps": steps,
        "loss": float(trainer.callback_metrics["val_loss"]),
        "training_losses": [round(loss, 5) for loss in losses.losses],
        "gradients": {kind: one.shares()._asdict() for kind, one in kinds.items()},
        "largest_gradient": max(one.largest for one in kinds.values()),
        "constant_scale": gradients.constant_scale,
        "skipped_steps": 0 if plugin is None else plugin.skipped_steps,
        "last_loss_scale": None if plugin is None else plugin.loss_scale,
        "vanished_updates": updates.vanished / updates.updates if updates.updates else None,
        "small_updates": updates.small / updates.updates if updates.updates else None,
    }


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case: means over its seeds, its distance from FP32, and whether that is more than a complete run's."""
    by_case = {case: {run["seed"]: run for run in runs if run["case"] == case.name} for case in CASES}
    reference = by_case[REFERENCE]

    def differences(case: Case) -> list[float]:
        return [run["loss"] - reference[seed]["loss"] for seed, run in by_case[case].items() if seed in reference]

    complete = [abs(d) for case in CASES if not case.part and case != REFERENCE for d in differences(case)]
    rows = []
    for case, own in by_case.items():
        if not own or not differences(case):
            continue
        above = statistics.mean(differences(case))

        def mean(of: Any, own: dict[int, Any] = own) -> float | None:
            values = [of(run) for run in own.values()]
            return None if None in values else statistics.mean(values)

        rows.append(
            {
                "case": case.name,
                "without": case.part,
                "seeds": len(own),
                "loss": mean(lambda run: run["loss"]),
                "above_fp32": above,
                "shows": above > max(complete) if case.part and complete else None,
                "zero_activation_gradients": mean(lambda run: run["gradients"]["activations"]["zero"]),
                "zero_weight_gradients": mean(lambda run: run["gradients"]["weights"]["zero"]),
                "vanished_updates": mean(lambda run: run["vanished_updates"]),
                "skipped_steps": mean(lambda run: run["skipped_steps"]),
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(title="Nats per byte, and what was lost on the way")
    table.add_column("run", no_wrap=True)
    for heading in ("val. loss", "- FP32", "shows", "zero gradients", "updates lost", "skipped"):
        table.add_column(heading, justify="right")
    for row in rows:
        lost = row["vanished_updates"]
        table.add_row(
            row["case"],
            f"{row['loss']:.4f}",
            "" if row["case"] == REFERENCE.name else f"{row['above_fp32']:+.4f}",
            {None: "", True: "yes", False: "no"}[row["shows"]],
            f"{row['zero_activation_gradients']:.1%}",
            "" if lost is None else f"{lost:.1%}" + ("" if row["without"] == "masters" else "*"),
            f"{row['skipped_steps']:g}",
        )
    console.print(table)
    console.print("Zero gradients: of activations. *: not lost, the half weight stood still and its master moved.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print, draw, and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, help="training steps of a run (default: 200; with --quick 8)")
    parser.add_argument("--seeds", type=int, help="how many seeds (default: 2; with --quick 1)")
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs; draws nothing")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/ablation_cpu.json)")
    parser.add_argument("--images", type=Path, help="the folder of the pictures (default: docs/images)")
    arguments = parser.parse_args(argv)
    steps = arguments.steps or (8 if arguments.quick else 200)
    seeds = arguments.seeds or (1 if arguments.quick else 2)
    out = arguments.out or result_path("ablation_cpu", quick=arguments.quick)
    images = arguments.images or (None if arguments.quick else IMAGES)
    if images is not None:
        images.mkdir(parents=True, exist_ok=True)

    where = {
        **environment("benchmarks.ablation", ["--steps", str(steps), "--seeds", str(seeds)]),
        "half_products": "FP32 products of half operands, rounded to half",
        "task": f"the example GPT, nano; {BATCH_SIZE} windows of {SEQ_LEN} bytes a step",
    }
    runs = kept(out, where, steps, seeds)
    done = {(run["case"], run["seed"]) for run in runs}
    todo = [(case, seed) for seed in range(seeds) for case in CASES if (case.name, seed) not in done]
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=len(todo))
        for case, seed in todo:
            progress.update(bar, description=f"{case.name}, seed {seed}")
            drawn = images / "gradient_exponents.png" if images and case == REFERENCE and seed == 0 else None
            runs.append(train(case, seed, steps, drawn))
            write_result(out, {"environment": where, "summary": summary(runs), "runs": runs})
            progress.advance(bar)
    rows = summary(runs)
    show(rows, console)
    if images is not None:
        draw(runs, rows, images / "ablation.png")
    return 0


def kept(path: Path, where: Mapping[str, Any], steps: int, seeds: int) -> list[dict[str, Any]]:
    """The runs in an earlier result that are of the same commit and length, and wanted."""
    result = earlier(path, where)
    runs = [] if result is None else result["runs"]
    return [run for run in runs if run["steps"] == steps and run["seed"] < seeds]


if __name__ == "__main__":
    sys.exit(main())
