"""How near `lightning-mpt estimate` comes to what is measured: both for the same step, network by network.

    python -m benchmarks.estimate                      # on the CPU
    python -m benchmarks.estimate --accelerator cuda   # on a GPU, with networks of a size for it
    python -m benchmarks.estimate --quick              # one network and two precisions, to see that it runs

Each step is trained in a fresh process under `MemoryProfiler`, and estimated without computing anything. The error of a
category is its difference at the peak as a share of the measured peak; the target is 3 % at most. Without a GPU, GPT-2
with 1.5 billion parameters is then estimated for one, and how long that takes and how much of this machine's memory.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from benchmarks import network_zoo
from benchmarks.common import MISSED, apart, environment, result_path, slug, write_result
from benchmarks.recorded import Repeated, Step, by_category, recorded
from examples.train_gpt import multiplies_bf16, quiet_lightning
from lightning_mpt.cli.estimate import estimate
from lightning_mpt.profiler import MemoryReport
from lightning_mpt.profiler.estimate import Trial
from lightning_mpt.profiler.estimate.lstm import without_onednn

OURS = "mpt-bf16-true"
PRECISIONS = {
    "cpu": ("32-true", "bf16-mixed", "bf16-true", OURS, f"{OURS}:compact"),
    "cuda": ("32-true", "16-mixed", "bf16-mixed", "mpt-16-true", OURS, f"{OURS}:compact"),
}
TARGET = 0.03
LARGE = {"layers": 48, "width": 1600, "heads": 25, "vocab_size": 50257, "seq_len": 1024, "batch_size": 8}
"""GPT-2 XL."""
LARGE_PRECISIONS = ("32-true", "mpt-16-true")


class LastOfLSTM(nn.Module):
    """Classes from the last step of an LSTM."""

    def __init__(self, features: int, width: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, width, layers, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def gpt2(
    *, layers: int, width: int, vocab_size: int, seq_len: int, batch_size: int, heads: int | None = None
) -> tuple[nn.Module, Any]:
    """GPT-2 of transformers, with dropout as in its configuration, and a batch of tokens."""
    text = {"vocab_size": vocab_size, "seq_len": seq_len}
    net = network_zoo.small_gpt2(layers=layers, heads=heads or width // 32, n_embd=width, **text)
    tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64)
    return net, {"input_ids": tokens, "labels": tokens.clone()}


def lstm(*, features: int, width: int, layers: int, steps: int, batch_size: int) -> tuple[nn.Module, Any]:
    batch = torch.zeros(batch_size, steps, features), torch.zeros(batch_size, dtype=torch.int64)
    return LastOfLSTM(features, width, layers), batch


def convnet(*, width: int, size: int, batch_size: int) -> tuple[nn.Module, Any]:
    layers: list[nn.Module] = []
    channels = 3
    for wide in (width, 2 * width, 4 * width):
        layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU(), nn.MaxPool2d(2)]
        channels = wide
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10)]
    batch = torch.zeros(batch_size, 3, size, size), torch.zeros(batch_size, dtype=torch.int64)
    return nn.Sequential(*layers), batch


def mlp(*, features: int, width: int, layers: int, batch_size: int) -> tuple[nn.Module, Any]:
    net: list[nn.Module] = []
    for index in range(layers):
        net += [nn.Linear(width if index else features, width), nn.GELU(), nn.Dropout(0.1)]
    batch = torch.zeros(batch_size, features), torch.zeros(batch_size, dtype=torch.int64)
    return nn.Sequential(*net, nn.Linear(width, 10)), batch


class Case(NamedTuple):
    """What makes a network and its batch, the arguments for it, and whether torch may use oneDNN."""

    make: Callable[..., tuple[nn.Module, Any]]
    shape: dict[str, int]
    onednn: bool = True


CASES = {
    "cpu": {
        "GPT-2, long": Case(gpt2, {"layers": 4, "width": 128, "vocab_size": 512, "seq_len": 512, "batch_size": 4}),
        "GPT-2, short": Case(gpt2, {"layers": 4, "width": 192, "vocab_size": 2048, "seq_len": 64, "batch_size": 8}),
        "LSTM": Case(lstm, {"features": 64, "width": 256, "layers": 2, "steps": 64, "batch_size": 32}),
        "convnet": Case(convnet, {"width": 32, "size": 32, "batch_size": 32}),
        "MLP": Case(mlp, {"features": 256, "width": 512, "layers": 4, "batch_size": 1024}),
    },
    "cuda": {
        "GPT-2, long": Case(
            gpt2, {"layers": 12, "width": 768, "heads": 12, "vocab_size": 50257, "seq_len": 1024, "batch_size": 8}
        ),
        "GPT-2, short": Case(
            gpt2, {"layers": 12, "width": 768, "heads": 12, "vocab_size": 50257, "seq_len": 128, "batch_size": 4}
        ),
        "LSTM": Case(lstm, {"features": 512, "width": 1024, "layers": 2, "steps": 256, "batch_size": 128}),
        "convnet": Case(convnet, {"width": 64, "size": 64, "batch_size": 256}),
        "MLP": Case(mlp, {"features": 1024, "width": 4096, "layers": 8, "batch_size": 8192}),
    },
}


def onednn_if_it_runs(precision: str, case: Case) -> AbstractContextManager[None]:
    """Under autocast an LSTM asks oneDNN for what it has not on CPUs without bf16: torch must do without it there."""
    runs = case.make is not lstm or precision != "bf16-mixed" or multiplies_bf16()
    return nullcontext() if case.onednn and runs else without_onednn()


def measured(precision: str, case: Case, device: str = "cpu") -> MemoryReport:
    """The profiler's report of a step that is really done, in this process."""
    net, batch = case.make(**case.shape)
    with onednn_if_it_runs(precision, case):
        return recorded(Step(net), Repeated(batch, 2), precision, device)


def estimated(precision: str, case: Case, device: str = "cpu") -> MemoryReport:
    """The same step, of which nothing is computed."""
    _, batch = case.make(**{**case.shape, "layers": 1} if "layers" in case.shape else case.shape)
    with onednn_if_it_runs(precision, case):
        return estimate(Trial(lambda: Step(case.make(**case.shape)[0]), [batch]), precision, device=device)


def figures(report: MemoryReport) -> dict[str, Any]:
    """A report's peak and its categories there, as JSON has them."""
    return {"peak_bytes": report.peak_bytes, "categories": by_category(report)}


def errors(measured: Mapping[str, Any], estimated: Mapping[str, Any]) -> dict[str, float]:
    """By category, and for the peak: the difference of two reports' figures as a share of the measured peak."""
    peak_bytes = measured["peak_bytes"]
    shares = {
        category: (estimated["categories"][category] - size) / peak_bytes
        for category, size in measured["categories"].items()
    }
    return {**shares, "peak": (estimated["peak_bytes"] - peak_bytes) / peak_bytes}


def compared(network: str, precision: str, measured: Mapping[str, Any], estimated: Mapping[str, Any]) -> dict[str, Any]:
    """A row: a step's figures as measured and as estimated, and the errors."""
    told = {"network": network, "precision": precision, "errors": errors(measured, estimated)}
    return {**told, "measured": measured, "estimated": estimated}


def child(kind: str, precision: str, device: str = "", name: str = "") -> dict[str, Any]:
    """What is done in a process of its own."""
    if kind == "measure":
        return figures(measured(precision, CASES[device][name], device))
    began = time.perf_counter()
    tokens = torch.zeros(LARGE["batch_size"], LARGE["seq_len"], dtype=torch.int64)
    batch = {"input_ids": tokens, "labels": tokens.clone()}
    report = estimate(Trial(lambda: Step(gpt2(**LARGE)[0]), [batch]), precision)
    return {
        "precision": precision,
        "parameters": report.parameters,
        "seconds": time.perf_counter() - began,
        "host_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_bytes": report.peak_bytes,
        "categories": by_category(report),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, estimate, print, and write the JSON. Returns MISSED where an error is beyond the target."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.estimate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--accelerator", choices=tuple(CASES), default="cpu", help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="one network and two precisions, to see that it runs")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/estimate_*.json)")
    parser.add_argument("--case", action="append", choices=tuple(CASES["cpu"]), help="only this network, or these")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        print("\n" + json.dumps(child(*arguments.child)))
        return 0

    device, quick = arguments.accelerator, arguments.quick
    cases, precisions = CASES[device], PRECISIONS[device]
    chosen = arguments.case or list(cases)
    if quick:
        chosen, precisions = arguments.case or ["GPT-2, short"], ("32-true", OURS)
    where = environment("benchmarks.estimate", ["--accelerator", device, *["--quick"] * quick])
    on = slug(where["gpu"]["name"]) if device == "cuda" else "cpu"
    out = arguments.out or result_path(f"estimate_{on}", quick=quick)
    console = Console()
    quiet_lightning()
    rows = []
    for name in chosen:
        for precision in track(precisions, name, console=console):
            real = apart("estimate", "measure", precision, device, name, limit_s=900)
            guess = figures(estimated(precision, cases[name], device))
            rows.append(compared(name, precision, real, guess))
    print_errors(rows, console)
    shapes = {name: {"make": case.make.__name__, **case.shape} for name, case in cases.items()}
    result: dict[str, Any] = {"environment": where, "cases": shapes, "rows": rows}
    if device == "cpu" and not quick:
        large = [apart("estimate", "large", precision, limit_s=900) for precision in LARGE_PRECISIONS]
        print_large(large, console)
        result["large"] = {**LARGE, "rows": large}
    write_result(out, result)
    missed = [row for row in rows if max(map(abs, row["errors"].values())) > TARGET]
    for row in missed:
        console.print(f"[red]missed: {row['network']} under {row['precision']}: {TARGET:.0%} is the target")
    return MISSED if missed else 0


def print_errors(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("network", "precision", "measured MiB", "estimated MiB", "peak", "worst category")
    for row in rows:
        of_categories = {name: error for name, error in row["errors"].items() if name != "peak"}
        worst = max(of_categories, key=lambda name: abs(of_categories[name]))
        table.add_row(
            row["network"],
            row["precision"],
            *(f"{row[kind]['peak_bytes'] / 2**20:.2f}" for kind in ("measured", "estimated")),
            f"{row['errors']['peak']:+.2%}",
            f"{of_categories[worst]:+.2%} {worst}",
        )
    console.print(table)


def print_large(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("precision", "peak GiB", "seconds", "host GiB", title="GPT-2 XL, 8 x 1024, estimated for CUDA")
    for row in rows:
        sizes = (row["peak_bytes"] / 2**30, row["host_peak_rss_bytes"] / 2**30)
        table.add_row(row["precision"], f"{sizes[0]:.1f}", f"{row['seconds']:.0f}", f"{sizes[1]:.2f}")
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
