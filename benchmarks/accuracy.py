"""Does it train as well? The example GPT under each precision, over some seeds, against the spread of FP32's own seeds.

    python -m benchmarks.accuracy                        # within an hour on two cores; may be stopped and continued
    python -m benchmarks.accuracy --steps 100 --seeds 2  # a quick one
    python -m benchmarks.accuracy --precision 32-true mpt-bf16-true:compact  # some of the precisions

Where the CPU has no instructions for products in bf16, they are FP32 products rounded to bf16 (`half_products.py`), and
the example is its smallest size: the file says so.
A seed draws the initial weights and the order of the data; the validation text is always the same. Every run is
a process of its own, and its result is kept at once: what is in the file, of the same commit and length, is not run
again. `minimal` cannot clip by norm, so it is held against FP32 without clipping.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.common import RESULTS, ROOT, environment, without_paths, write_result
from benchmarks.half_products import HalfProducts
from examples import train_gpt

OURS = "mpt-bf16-true"
REFERENCE, UNCLIPPED = "32-true", "32-true, unclipped"
PRECISIONS = (REFERENCE, "bf16-mixed", "bf16-true", OURS, f"{OURS}:compact", UNCLIPPED, f"{OURS}:minimal")


def reference_of(precision: str) -> str:
    """What a precision is held against: the FP32 run that is clipped as it is."""
    return UNCLIPPED if precision.endswith((":minimal", "unclipped")) else REFERENCE


def train(precision: str, seed: int, steps: int, size: str) -> float:
    """The example's validation loss, in nats per byte."""
    name, _, unclipped = precision.partition(", ")
    arguments = [
        "--precision",
        name,
        "--seed",
        str(seed),
        "--steps",
        str(steps),
        "--size",
        size,
        "--accelerator",
        "cpu",
    ]
    if unclipped:
        arguments.append("--no-clipping")
    products = contextlib.nullcontext() if train_gpt.multiplies_bf16() else HalfProducts()
    with contextlib.redirect_stdout(io.StringIO()), products:
        return train_gpt.main(arguments)


def train_apart(precision: str, seed: int, steps: int, size: str, threads: int) -> dict[str, Any]:
    """`train` in a fresh process. The last line that it prints is the answer."""
    command = [sys.executable, "-m", "benchmarks.accuracy", "--child", precision, str(seed), str(steps), size]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3600, env=variables)
    if done.returncode != 0:
        raise RuntimeError(
            f"{precision} with seed {seed} ended with status {done.returncode}:\n{without_paths(done.stderr)}"
        )
    loss = json.loads(done.stdout.splitlines()[-1])
    return {"precision": precision, "seed": seed, "steps": steps, "size": size, "loss": loss}


def summary(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each precision: the mean loss, its spread, and whether it is within the spread of FP32's seeds."""
    losses: dict[str, dict[int, float]] = {}
    for run in runs:
        losses.setdefault(run["precision"], {})[run["seed"]] = run["loss"]
    rows = []
    for precision in PRECISIONS:
        if precision not in losses or reference_of(precision) not in losses:
            continue
        mine, reference = losses[precision], losses[reference_of(precision)]
        mean = statistics.mean(mine.values())
        paired = [mine[seed] - reference[seed] for seed in mine if seed in reference]
        rows.append(
            {
                "precision": precision,
                "reference": reference_of(precision),
                "seeds": len(mine),
                "mean": mean,
                "lowest": min(mine.values()),
                "highest": max(mine.values()),
                "mean_difference": statistics.mean(paired) if paired else None,
                "within_the_references_spread": min(reference.values()) <= mean <= max(reference.values()),
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table("precision", "val. loss", "of its seeds", "- FP32", "in FP32's spread", title="Nats per byte")
    for row in rows:
        table.add_row(
            row["precision"],
            f"{row['mean']:.4f}",
            f"{row['lowest']:.4f} to {row['highest']:.4f}",
            "" if row["precision"] == row["reference"] else f"{row['mean_difference']:+.4f}",
            "" if row["precision"] == row["reference"] else ("yes" if row["within_the_references_spread"] else "no"),
        )
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print, and write the JSON. Returns 1 where a precision of ours is outside FP32's spread."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=description)
    parser.add_argument("--steps", type=int, default=400, help="training steps of a run (default: 400)")
    parser.add_argument("--size", help="of the example's GPT (default: tiny; nano where the CPU has no bf16)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default: 3)")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--out", type=Path, default=RESULTS / "accuracy_cpu.json", help="where the JSON goes")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.child:
        precision, seed, steps, size = arguments.child
        loss = train(precision, int(seed), int(steps), size)
        print("\n" + json.dumps(loss))
        return 0

    native = train_gpt.multiplies_bf16()
    size = arguments.size or ("tiny" if native else "nano")
    options = ["--size", size, "--steps", str(arguments.steps), "--seeds", str(arguments.seeds)]
    if set(arguments.precision) != set(PRECISIONS):
        options += ["--precision", *(f'"{name}"' if " " in name else name for name in arguments.precision)]
    where = {
        **environment("benchmarks.accuracy", options),
        "half_products": "the CPU's own" if native else "FP32 products of half operands, rounded to half",
    }
    runs = kept(arguments.out, where["commit"], arguments.steps, size)
    done = {(run["precision"], run["seed"]) for run in runs}
    todo = [(p, s) for s in range(arguments.seeds) for p in arguments.precision if (p, s) not in done]
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    console = Console()
    with Progress(console=console) as progress, ThreadPoolExecutor(arguments.jobs) as pool:
        bar = progress.add_task("training", total=len(todo))

        def run_one(case: tuple[str, int]) -> None:
            runs.append(train_apart(*case, arguments.steps, size, threads))
            write_result(arguments.out, {"environment": where, "runs": list(runs), "summary": summary(runs)})
            progress.advance(bar)

        list(pool.map(run_one, todo))
    rows = summary(runs)
    show(rows, console)
    write_result(arguments.out, {"environment": where, "runs": runs, "summary": rows})
    outside = [row for row in rows if row["precision"].startswith(OURS) and not row["within_the_references_spread"]]
    return 1 if outside else 0


def kept(path: Path, commit: str, steps: int, size: str) -> list[dict[str, Any]]:
    """The runs in an earlier result that are of the same commit, length and size."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["environment"]["commit"] != commit:
        return []
    return [run for run in earlier["runs"] if run["steps"] == steps and run.get("size") == size]


if __name__ == "__main__":
    sys.exit(main())
