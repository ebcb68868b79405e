"""How near `lightning-mpt estimate` comes to the training steps that the CUDA check has measured. Needs no GPU.

    python -m benchmarks.estimate_of_check                # of the kept results of `benchmarks.cuda`
    python -m benchmarks.estimate_of_check --check FILE   # of this one

Each step that a GPU has taken is estimated here. The error of a category is its difference at the peak as a share of
the measured peak; the target is 5 % of the peak.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.common import MISSED, RESULTS, environment, write_result
from benchmarks.cuda_pieces import CASES, VOCAB_SIZE
from benchmarks.cuda_words import NETWORKS, found
from benchmarks.estimate import compared, figures, print_errors
from examples.train_gpt import GPTModule, quiet_lightning
from lightning_mpt.cli.estimate import estimate
from lightning_mpt.profiler import MemoryReport
from lightning_mpt.profiler.estimate import Trial

TARGET = 0.05


def estimated(name: str) -> MemoryReport:
    """The estimate of a step by its piece's name, `train:LENGTH:PRECISION`."""
    _, length, precision = name.split(":", 2)
    size, batch_size, seq_len, _ = CASES[length]
    tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    trial = Trial(lambda: GPTModule(size, vocab_size=VOCAB_SIZE, seq_len=1024), [[tokens, tokens.clone()]])
    return estimate(trial, precision)


def row(name: str, piece: dict[str, Any]) -> dict[str, Any]:
    """A step as it was measured and as it is estimated, by its piece's name."""
    _, length, precision = name.split(":", 2)
    network = f"{NETWORKS[length]}, {piece['batch_size']} x {piece['seq_len']}"
    measured = {key: piece[key] for key in ("peak_bytes", "categories")}
    return compared(network, precision, measured, figures(estimated(name)))


def main(argv: Sequence[str] | None = None) -> int:
    """Estimate, print, and write the JSON. Returns MISSED where a peak is off by more than the target."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate_of_check", description=description)
    parser.add_argument("--check", type=Path, help="a result of `benchmarks.cuda` (default: the newest that is kept)")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: results/estimate_of_check.json)")
    arguments = parser.parse_args(argv)
    kept = sorted(RESULTS.glob("cuda-*.json"), key=lambda path: path.name[-len("2000-01-01-0000.json") :])
    if arguments.check is None and not kept:
        parser.error("no result of `python -m benchmarks.cuda` is kept: run it on a machine with a GPU first")
    check = json.loads((arguments.check or kept[-1]).read_text(encoding="utf-8"))
    console = Console()
    quiet_lightning()
    pieces = dict(found(check, "train:"))
    rows = [row(*item) for item in track(pieces.items(), "estimating", console=console)]
    print_errors(rows, console)
    where = environment("benchmarks.estimate_of_check")
    content = {"environment": where, "measured_by": check["environment"], "rows": rows}
    write_result(arguments.out or RESULTS / "estimate_of_check.json", content)
    return MISSED if any(abs(row["errors"]["peak"]) > TARGET for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
