"""Peak memory of a training step of GPT-2 (transformers) under every precision, in a fresh process each, on the CPU.

    python -m benchmarks.memory

The peak is the allocator's own, read by `lightning_mpt.profiler`. What arithmetic allows, with `split` masters: half of
the activations and 14/16 of the model state that FP32 training holds at its peak. The target is that plus 0.04.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import RESULTS, ROOT, environment, without_paths, write_result
from examples.train_gpt import precision_arguments, quiet_lightning
from lightning_mpt.profiler import MemoryProfiler

REFERENCE = "32-true"
PRECISIONS = (REFERENCE, "bf16-mixed", "bf16-true", "mpt-bf16-true")
MODEL_STATE = ("weights", "master_weights", "gradients", "optimizer_state")
MARGIN = 0.04


class Case(NamedTuple):
    """One GPT-2 and its batch, and the share of FP32's peak that is the target for `mpt-bf16-true`."""

    layers: int
    width: int
    vocab_size: int
    batch_size: int
    seq_len: int
    target: float


CASES = {
    "long": Case(layers=6, width=256, vocab_size=512, batch_size=8, seq_len=1024, target=0.54),
    "short": Case(layers=6, width=384, vocab_size=512, batch_size=24, seq_len=64, target=0.64),
}


class GPT2(L.LightningModule):
    """transformers' GPT-2 with fresh weights and no dropout, under AdamW."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        heads = case.width // 64
        config = GPT2Config(
            vocab_size=case.vocab_size,
            n_positions=case.seq_len,
            n_embd=case.width,
            n_layer=case.layers,
            n_head=heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
        self.model = GPT2LMHeadModel(config)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        (tokens,) = batch
        return self.model(input_ids=tokens, labels=tokens).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def measure(precision: str, case: Case) -> dict[str, Any]:
    """Train for five steps in this process and return the report's figures."""
    quiet_lightning()
    L.seed_everything(0, verbose=False)
    module = GPT2(case)
    tokens = torch.randint(case.vocab_size, (5 * case.batch_size, case.seq_len))
    profiler = MemoryProfiler(tempfile.mkdtemp(), warmup_steps=2, steps=2)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        profiler=profiler,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **precision_arguments(precision),
    )
    trainer.fit(module, DataLoader(TensorDataset(tokens), batch_size=case.batch_size))
    report = profiler.report
    return {
        "precision": precision,
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "peak_bytes": report.peak_bytes,
        "categories": {str(category): size for category, size in report.categories.items()},
    }


def measure_apart(precision: str, name: str) -> dict[str, Any]:
    """`measure` in a fresh process. The last line that it prints is the answer."""
    command = [sys.executable, "-m", "benchmarks.memory", "--child", precision, name]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    if done.returncode != 0:
        raise RuntimeError(
            f"{name} under {precision} ended with status {done.returncode}:\n{without_paths(done.stderr)}"
        )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def arithmetic(reference: dict[str, Any]) -> float:
    """Half of the activations and 14/16 of the model state at FP32's peak, as a share of that peak."""
    state = sum(reference["categories"].get(name, 0) for name in MODEL_STATE)
    return (0.5 * (reference["peak_bytes"] - state) + 14 / 16 * state) / reference["peak_bytes"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and write the JSON. Returns 1 where a target was missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "memory_cpu.json", help="where the JSON goes")
    parser.add_argument("--child", nargs=2, metavar=("PRECISION", "CASE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        precision, name = arguments.child
        print("\n" + json.dumps(measure(precision, CASES[name])))
        return 0

    where = environment("benchmarks.memory")
    console = Console()
    table = Table("sequences", "precision", "peak MiB", "of 32-true", "arithmetic", title="Peak memory of GPT-2 on CPU")
    cases: dict[str, Any] = {}
    missed = []
    for name, case in CASES.items():
        rows = [measure_apart(precision, name) for precision in track(PRECISIONS, name, console=console)]
        reference = rows[0]
        least = arithmetic(reference)
        for row in rows:
            row["share_of_32_true"] = row["peak_bytes"] / reference["peak_bytes"]
            ours = row["precision"].startswith("mpt-")
            table.add_row(
                f"{name} ({case.seq_len})",
                row["precision"],
                f"{row['peak_bytes'] / 2**20:.1f}",
                f"{row['share_of_32_true']:.3f}",
                f"{least:.3f}" if ours else "",
            )
            if ours and row["share_of_32_true"] > min(case.target, least + MARGIN):
                missed.append(f"{name}: {row['share_of_32_true']:.3f}, target {case.target} and {least:.3f} + {MARGIN}")
        cases[name] = {**case._asdict(), "arithmetic": least, "margin": MARGIN, "rows": rows}
    console.print(table)
    for line in missed:
        console.print(f"[red]missed: {line}")
    write_result(arguments.out, {"environment": where, "cases": cases})
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
