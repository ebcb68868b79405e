"""Peak memory of a training step under every precision, in a fresh process each, on the CPU: GPT-2 and a ResNet.

    python -m benchmarks.memory
    python -m benchmarks.memory --quick   # one network, three precisions: to see that it runs

The peak is the allocator's own, read by `lightning_mpt.profiler`. What arithmetic allows, with `split` masters: half of
the activations and 14/16 of the model state that FP32 training holds at its peak. The target is that plus 0.04; with
compact storage, half of all, whatever the model.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks import network_zoo
from benchmarks.common import MISSED, apart, environment, result_path, write_result
from benchmarks.recorded import Step, by_category, recorded
from lightning_mpt.profiler.category import MODEL_STATE

REFERENCE = "32-true"
OURS = "mpt-bf16-true"
PRECISIONS = (REFERENCE, "bf16-mixed", "bf16-true", OURS, f"{OURS}:compact", f"{OURS}:minimal")
MARGIN = 0.04
COMPACT_TARGET = 0.5
Sample = Callable[[], dict[str, Tensor]]


class Case(NamedTuple):
    """A network and its batch, and the share of FP32's peak that is the target for exact masters, if there is one."""

    model: str
    shape: dict[str, int]
    batch_size: int
    target: float | None = None


CASES = {
    "GPT-2, long": Case("gpt2", {"layers": 6, "width": 128, "vocab_size": 512, "seq_len": 1024}, 8, target=0.54),
    "GPT-2, short": Case("gpt2", {"layers": 6, "width": 384, "vocab_size": 512, "seq_len": 64}, 24, target=0.64),
    "ResNet": Case("resnet", {"width": 128, "image_size": 64}, 24),
}
"""The long GPT-2 is ruled by activations, the short one by parameters."""


def build(model: str, shape: dict[str, int]) -> tuple[nn.Module, Sample]:
    """The network, `gpt2` or `resnet`, and what makes one sample of its data."""
    if model == "gpt2":
        size = {"layers": shape["layers"], "heads": shape["width"] // network_zoo.HEAD_WIDTH}
        text = {"vocab_size": shape["vocab_size"], "seq_len": shape["seq_len"]}
        gpt2 = network_zoo.small_gpt2(**size, **text, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)

        def tokens() -> dict[str, Tensor]:
            drawn = torch.randint(shape["vocab_size"], (shape["seq_len"],))
            return {"input_ids": drawn, "labels": drawn}

        return gpt2, tokens
    from transformers import ResNetConfig, ResNetForImageClassification

    width, size = shape["width"], shape["image_size"]
    hidden = [width, 2 * width, 4 * width]
    resnet = ResNetConfig(embedding_size=width // 4, hidden_sizes=hidden, depths=[2, 2, 2], num_labels=10)

    def image() -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(3, size, size), "labels": torch.randint(10, ())}

    return ResNetForImageClassification(resnet), image


def measure(precision: str, case: Case) -> dict[str, Any]:
    """The figures of a recorded step, in this process."""
    L.seed_everything(0, verbose=False)
    model, sample = build(case.model, case.shape)
    module = Step(model)
    samples = [sample() for _ in range(2 * case.batch_size)]
    report = recorded(module, DataLoader(samples, batch_size=case.batch_size), precision, "cpu")
    return {
        "precision": precision,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "peak_bytes": report.peak_bytes,
        "categories": by_category(report),
    }


def arithmetic(reference: dict[str, Any]) -> float:
    """Half of the activations and 14/16 of the model state at FP32's peak, as a share of that peak."""
    state = sum(reference["categories"].get(name, 0) for name in MODEL_STATE)
    return (0.5 * (reference["peak_bytes"] - state) + 14 / 16 * state) / reference["peak_bytes"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the JSON. Returns MISSED where a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one network under three precisions, to see that it runs")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/memory_cpu.json)")
    parser.add_argument("--child", nargs=2, metavar=("PRECISION", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        precision, name = arguments.child
        print("\n" + json.dumps(measure(precision, CASES[name])))
        return 0

    quick = arguments.quick
    names, precisions = (("ResNet",), (REFERENCE, OURS, f"{OURS}:compact")) if quick else (CASES, PRECISIONS)
    where = environment("benchmarks.memory", ["--quick"] * quick)
    console = Console()
    table = Table("network", "precision", "peak MiB", "of 32-true", "target", title="Peak memory of a step on CPU")
    cases: dict[str, Any] = {}
    missed = []
    for name in names:
        case = CASES[name]
        rows = [apart("memory", each, name, limit_s=1800) for each in track(precisions, name, console=console)]
        reference = rows[0]
        least = arithmetic(reference)
        targets = {OURS: least + MARGIN if case.target is None else min(case.target, least + MARGIN)}
        targets |= {f"{OURS}:{preset}": COMPACT_TARGET for preset in ("compact", "minimal")}
        for row in rows:
            precision = row["precision"]
            share = row["share_of_32_true"] = row["peak_bytes"] / reference["peak_bytes"]
            target = row["target"] = targets.get(precision)
            shown = "" if target is None else f"{target:.3f}"
            table.add_row(name, precision, f"{row['peak_bytes'] / 2**20:.1f}", f"{share:.3f}", shown)
            if target is not None and share > target:
                missed.append(f"{name} under {precision}: {share:.3f}, target {target:.3f}")
        cases[name] = {**case._asdict(), "arithmetic": least, "margin": MARGIN, "rows": rows}
    console.print(table)
    for line in missed:
        console.print(f"[red]missed: {line}")
    write_result(arguments.out or result_path("memory_cpu", quick=quick), {"environment": where, "cases": cases})
    return MISSED if missed else 0


if __name__ == "__main__":
    sys.exit(main())
