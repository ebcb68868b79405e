"""How much memory is saved on the networks that people train, and what then fits. ESTIMATED.

    python -m benchmarks.networks                                   # may be stopped, and goes on where it was
    python -m benchmarks.networks --quick                           # three networks, to benchmarks/results/quick/
    python -m benchmarks.networks --measure --network "GPT-2 XL"    # on a GPU: a real step beside each estimate

Under every precision a step of each network is estimated for a CUDA device by the machinery of `lightning-mpt
estimate`: the real network and Trainer on tensors that have no memory. From that:

- what is at the peak, by category, and what is saved of 32-true's; FP32's shares, held against what is usually said;
- the largest batch that fits. Each phase's peak grows with the batch along a straight line, drawn through the batch
  that is shown and one that about fills the least memory, or the most where the first fits the least;
- the largest GPT-2 that fits with 8 x 1024 tokens. Small, medium and large have, with L layers, 8 + L/3 heads of 64
  (XL, with 48 layers, has 25 where this gives 24), and so has every size here. Each phase's peak is a straight line in
  the number of layers, drawn through 2 and 4, and of degree two in the width, drawn through three; how far that is off
  for GPT-2 large, which is estimated whole as well, is in the result.

GB are 10**9 bytes. An estimate leaves out the CUDA context, fragmentation and cuDNN's workspaces. `bf16-mixed` takes
what `16-mixed` takes, and ours in bf16 what it takes in fp16: these are not shown twice (`minimal` is shown in bf16,
since in fp16 it asks for a constant loss scale).
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from math import prod
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from benchmarks import network_zoo
from benchmarks.common import ROOT, apart, environment, result_path, version, write_result
from benchmarks.network_pictures import draw
from benchmarks.network_zoo import GPT2, GPT2_BATCH_SIZE, Network, gpt2_network
from benchmarks.recorded import Repeated, by_category, recorded
from examples.train_gpt import quiet_lightning
from lightning_mpt.cli.estimate import estimate
from lightning_mpt.profiler import MemoryReport
from lightning_mpt.profiler.estimate import Trial, largest_batch
from lightning_mpt.profiler.show.claims import FP32, share_claims

PRECISIONS = (FP32, "16-mixed", "16-true", "mpt-16-true", "mpt-16-true:compact", "mpt-bf16-true:minimal")
MEMORIES = {"24 GB": 24 * 10**9, "80 GB": 80 * 10**9, "140 GB": 140 * 10**9}
QUICK = ("AlexNet", "ResNet-50", "GPT-2 small")
FAMILY = "GPT-2 family"
"""What the search for the largest model is called among the networks."""
FIXED = ("weights", "master_weights", "gradients", "optimizer_state", "buffers")
"""Of what is at the peak, what does not grow with the batch."""
FEW_LAYERS = (2, 4)
WIDTHS = (8, 32, 56)
"""Thirds of the layers that go with them: 1024, 2560 and 4096 wide."""
CHECKED = "GPT-2 large"
IMAGES = ROOT / "docs" / "images"

Phases = Mapping[str, float]
"""The peak of each phase of a step."""


def phases_of(network: Network, precision: str, batch_size: int) -> tuple[MemoryReport, Phases]:
    """The estimate of a step, and its phases' peaks."""
    report = estimate(Trial(network.module, [network.batch()]), precision, batch_size=batch_size)
    return report, {name: phase.peak_bytes for name, phase in report.phases.items()}


def through(known: Mapping[int, Phases], at: int) -> Phases:
    """Each phase's peak at a size, on the polynomial through all known sizes: a line through two, Lagrange's."""

    def weight(one: int) -> float:
        return prod((at - other) / (one - other) for other in known if other != one)

    return {name: sum(weight(one) * known[one][name] for one in known) for name in next(iter(known.values()))}


def row(network: Network, precision: str) -> dict[str, Any]:
    """One network under one precision: its peak, and the largest batch for each memory."""
    quiet_lightning()
    began = time.perf_counter()
    report, phases = phases_of(network, precision, network.batch_size)
    known = {network.batch_size: phases}
    fixed = sum(size for category, size in report.categories.items() if str(category) in FIXED)
    grows = max(1.0, (report.peak_bytes - fixed) / network.batch_size)
    # From the least memory to this batch, or from this batch to the most: answers lie between, or a little beyond.
    memory_bytes = min(MEMORIES.values()) if report.peak_bytes > min(MEMORIES.values()) else max(MEMORIES.values())
    size = max(network.smallest_batch, int((memory_bytes - fixed) / grows))
    size = size if size != network.batch_size else size + 1
    known[size] = phases_of(network, precision, size)[1]

    def peak_of(samples: int) -> int:
        return round(max(through(known, samples).values()))

    fits = {name: largest_batch(peak_of, memory_bytes, network.batch_size) for name, memory_bytes in MEMORIES.items()}
    claims = [{**vars(claim), "holds": claim.holds} for claim in share_claims(report)] if precision == FP32 else []
    return {
        "network": network.name,
        "precision": precision,
        "library": network.library,
        "input": network.input,
        "batch_size": network.batch_size,
        "parameters": report.parameters,
        "peak_bytes": report.peak_bytes,
        "categories": by_category(report),
        "phases": dict(phases),
        "largest_batch": {name: size if size >= network.smallest_batch else 0 for name, size in fits.items()},
        "estimated_batches": {str(size): dict(peaks) for size, peaks in sorted(known.items())},
        "claims": claims,
        "seconds": round(time.perf_counter() - began, 1),
    }


def family_heads(layers: int) -> int:
    """Heads of 64 in a GPT-2 of that many layers, a multiple of three."""
    return 8 + layers // 3


def family_row(precision: str) -> dict[str, Any]:
    """The largest GPT-2 for each memory under one precision, and the peak of GPT-2 large as the lines have it."""
    quiet_lightning()
    began = time.perf_counter()
    few = {
        thirds: {
            layers: phases_of(gpt2_network("", layers, family_heads(3 * thirds)), precision, GPT2_BATCH_SIZE)[1]
            for layers in FEW_LAYERS
        }
        for thirds in WIDTHS
    }

    def peak_of(thirds: int) -> int:
        of_widths = {at: through(known, 3 * thirds) for at, known in few.items()}
        return round(max(through(of_widths, thirds).values()))

    largest = {}
    for name, memory_bytes in MEMORIES.items():
        layers = 3 * largest_batch(peak_of, memory_bytes, first=12)
        heads = family_heads(layers)
        with torch.device("meta"):
            parameters = sum(each.numel() for each in network_zoo.gpt2(layers, heads).parameters()) if layers else 0
        largest[name] = {"layers": layers, "heads": heads, "width": 64 * heads, "parameters": parameters}
    return {
        "network": FAMILY,
        "precision": precision,
        "batch_size": GPT2_BATCH_SIZE,
        "largest_model": largest,
        "checked_peak_bytes": peak_of(GPT2[CHECKED]["layers"] // 3),
        "seconds": round(time.perf_counter() - began, 1),
    }


def work(name: str, precision: str) -> dict[str, Any]:
    """What is done for one name and precision, in whichever process."""
    torch.set_num_threads(1)
    return family_row(precision) if name == FAMILY else row(network_zoo.networks()[name], precision)


def done(todo: Sequence[tuple[str, str]], jobs: int) -> Iterator[dict[str, Any]]:
    """The rows, as they come: in this process, or in as many others as there are jobs."""
    if jobs == 1:
        yield from (work(*each) for each in todo)
        return
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(work, *each) for each in todo]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows by network, each with what it saves against FP32; and the family's, with the lines' error."""
    order = {name: rank for rank, name in enumerate((*network_zoo.NAMES, FAMILY))}
    ranked = sorted(rows, key=lambda row: (order.get(row["network"], -1), PRECISIONS.index(row["precision"])))
    peaks = {(row["network"], row["precision"]): row["peak_bytes"] for row in ranked if "peak_bytes" in row}
    for row in ranked:
        whole, base = peaks.get((CHECKED, row["precision"])), peaks.get((row["network"], FP32))
        if row["network"] == FAMILY:
            row["error_for_gpt2_large"] = None if whole is None else row["checked_peak_bytes"] / whole - 1
        else:
            row["saved"] = None if base is None else 1 - row["peak_bytes"] / base
    return {
        "networks": [row for row in ranked if row["network"] != FAMILY],
        "largest_models": [row for row in ranked if row["network"] == FAMILY],
    }


def show(result: Mapping[str, Any], console: Console) -> None:
    """Print the tables."""
    table = Table(title="A training step on a CUDA device, ESTIMATED")
    table.add_column("network, batch", no_wrap=True)
    table.add_column("precision", no_wrap=True)
    parts = {"model": MODEL, "activations": ("activations",), "temporaries": ("temporaries",)}
    for heading in ("peak GB", "saved", *parts, *(f"batch in {name}" for name in MEMORIES)):
        table.add_column(heading, justify="right")
    for row in result["networks"]:
        first = row["precision"] == FP32
        sizes = (sum(row["categories"][category] for category in of) for of in parts.values())
        table.add_row(
            f"{row['network']}, {row['batch_size']} x {row['input']}" if first else "",
            row["precision"],
            f"{row['peak_bytes'] / 1e9:.1f}",
            "" if first or row["saved"] is None else f"{row['saved']:.0%}",
            *(f"{size / 1e9:.1f}" for size in sizes),
            *(str(row["largest_batch"][name] or "none") for name in MEMORIES),
        )
    console.print(table)
    claims = Table(title="FP32's peak, ESTIMATED, against what is usually said")
    claims.add_column("network")
    for said in next((row["claims"] for row in result["networks"] if row["claims"]), []):
        claims.add_column(f"{said['about']} {said['low']:.0%} to {said['high']:.0%}", justify="right")
    for row in result["networks"]:
        if row["claims"]:
            cells = (f"{one['share']:.0%} {'holds' if one['holds'] else 'no'}" for one in row["claims"])
            claims.add_row(row["network"], *cells)
    console.print(claims)
    models = Table(title=f"The largest GPT-2 at {GPT2_BATCH_SIZE} x 1024 tokens, ESTIMATED")
    models.add_column("precision")
    for name in MEMORIES:
        models.add_column(name, justify="right")
    for row in result["largest_models"]:
        models.add_row(row["precision"], *(model_in_words(row["largest_model"][name]) for name in MEMORIES))
    if result["largest_models"]:
        console.print(models)


MODEL = ("weights", "master_weights", "gradients", "optimizer_state")


def model_in_words(model: Mapping[str, int]) -> str:
    """`2.1 B (63 x 1856)`: parameters, layers and width."""
    return f"{model['parameters'] / 1e9:.2f} B ({model['layers']} x {model['width']})" if model["layers"] else "none"


# -- on a GPU ---------------------------------------------------------------------------------------------------------


def measured(network: Network, precision: str, batch_size: int, accelerator: str = "gpu") -> dict[str, Any]:
    """What a step really takes, in this process."""
    report = recorded(network.module(), Repeated(network.batch(batch_size), 2), precision, accelerator)
    return {
        "measured_peak_bytes": report.peak_bytes,
        "measured_reserved_bytes": report.reserved_bytes,
        "measured_categories": by_category(report),
    }


def beside(network: Network, precision: str, memory_bytes: int) -> dict[str, Any]:
    """An estimate, and, where it fits, what a step in a fresh process really takes, or its error."""
    quiet_lightning()
    report, _ = phases_of(network, precision, network.batch_size)
    found = {
        "network": network.name,
        "precision": precision,
        "batch_size": network.batch_size,
        "peak_bytes": report.peak_bytes,
        "categories": by_category(report),
        "fits": report.peak_bytes < memory_bytes,
    }
    if not found["fits"]:
        return found
    try:
        return {**found, **apart("networks", network.name, precision, limit_s=600)}
    except RuntimeError as error:
        return {**found, "error": str(error)[-2000:]}


def show_measured(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = Table(
        "network", "precision", "estimated GB", "measured GB", "error", title="A real step beside its estimate"
    )
    for row in rows:
        real = row.get("measured_peak_bytes")
        state = "failed" if "error" in row else f"{real / 1e9:.2f}" if real else "does not fit"
        error = f"{row['peak_bytes'] / real - 1:+.1%}" if real else ""
        table.add_row(row["network"], row["precision"], f"{row['peak_bytes'] / 1e9:.2f}", state, error)
    console.print(table)


# -- the command ------------------------------------------------------------------------------------------------------


def kept(path: Path, where: Mapping[str, Any], asked: Collection[str]) -> list[dict[str, Any]]:
    """The rows of an earlier result that stand: all of the same commit, and of another those that nobody asks for now.

    So a call for some networks, or on a machine that lacks a library, leaves the others' rows as they are. A row from
    another commit or command says so: it has a key `environment` of its own.
    """
    if not path.exists():
        return []
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for row in (*result["networks"], *result.get("largest_models", [])):
        of = row.pop("environment", result["environment"])
        if of["commit"] == where["commit"] or row["network"] not in asked:
            here = all(of[key] == where[key] for key in ("commit", "command"))
            rows.append(row if here else {**row, "environment": of})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Estimate or measure what is missing, print, draw, and write the JSON. Returns 2 where a GPU is missing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--quick", action="store_true", help=f"only {', '.join(QUICK)}; to benchmarks/results/quick/")
    parser.add_argument("--measure", action="store_true", help="train a real step of what fits on this machine's GPU")
    parser.add_argument("--jobs", type=int, default=2, help="processes that estimate, of one thread each (default: 2)")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: benchmarks/results/networks.json)")
    parser.add_argument("--images", type=Path, help="the folder of the picture (default: docs/images)")
    parser.add_argument("--child", nargs=2, metavar=("NAME", "PRECISION"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    every = network_zoo.networks()
    if arguments.child:
        network = every[arguments.child[0]]
        print("\n" + json.dumps(measured(network, arguments.child[1], network.batch_size)))
        return 0
    names = arguments.network or ([name for name in QUICK if name in every] if arguments.quick else [*every, FAMILY])
    if missing := [name for name in names if name in network_zoo.NAMES and name not in every]:
        parser.error(f"--network {missing[0]!r} is torchvision's, which is not installed here")
    if unknown := [name for name in names if name not in (*every, FAMILY)]:
        parser.error(f"--network {unknown[0]!r} is not one of {', '.join((*every, FAMILY))}")
    if arguments.measure and not torch.cuda.is_available():
        print(
            "--measure needs a CUDA device and this machine has none: without it, steps are estimated.", file=sys.stderr
        )
        return 2

    if arguments.measure:  # the largest models are only estimated
        names = [name for name in names if name != FAMILY]
    out = arguments.out or result_path("networks_cuda" if arguments.measure else "networks", quick=arguments.quick)
    flags = [f"--{flag}" for flag in ("quick", "measure") if getattr(arguments, flag)]
    selected = ["--network", *(f'"{name}"' for name in arguments.network)] if arguments.network else []
    where = environment("benchmarks.networks", [*flags, *selected])
    where["cpu_threads"] = arguments.jobs
    where["versions"]["torchvision"] = version("torchvision")
    rows = kept(out, where, names)
    known = {(row["network"], row["precision"]) for row in rows}
    todo = [(name, precision) for name in names for precision in PRECISIONS if (name, precision) not in known]
    order: Callable[[Sequence[dict[str, Any]]], Mapping[str, Any]] = summary
    finding = done(todo, arguments.jobs)
    if arguments.measure:
        memory_bytes = torch.cuda.get_device_properties(0).total_memory
        order = _as_measured
        finding = (beside(every[name], precision, memory_bytes) for name, precision in todo)
    console = Console()
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("measuring" if arguments.measure else "estimating", total=len(todo))
        for row in finding:
            rows.append(row)
            write_result(out, {"environment": where, **order(rows)})
            progress.update(bar, advance=1, description=escape(f"{row['network']}, {row['precision']}"))
    if arguments.measure:
        show_measured(rows, console)
        return 1 if any("error" in row for row in rows) else 0
    result = summary(rows)
    show(result, console)
    images = arguments.images or (None if arguments.quick or arguments.network else IMAGES)
    if images is not None:
        images.mkdir(parents=True, exist_ok=True)
        draw(result, images / "networks.png")
    return 0


def _as_measured(rows: Sequence[dict[str, Any]]) -> Mapping[str, Any]:
    return {"networks": list(rows)}


if __name__ == "__main__":
    sys.exit(main())
