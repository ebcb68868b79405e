"""Does it train as well? Five kinds of network under each precision, against the spread of FP32's own seeds.

    python -m benchmarks.accuracy            # a quarter of an hour on two cores; may be stopped and continued
    python -m benchmarks.accuracy --quick    # a few steps of everything, to see that it runs; says nothing
    python -m benchmarks.accuracy --task gan --precision 32-true mpt-bf16-true:compact

The tasks are in `tasks.py`. Where the CPU has no instructions for half products, they are FP32 products rounded to half
(`half_products.py`): the file says so. The result of a run is kept at once: what is in the file, of the same commit,
device and length, is not run again.

A precision is *inside* where its mean is between the lowest and the highest figure of FP32's seeds, else better or
worse than all of them. One seed has no spread. `minimal` cannot clip by norm: where a task clips, it is held
against FP32 without clipping.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.common import MISSED, earlier, environment, result_path, write_result
from benchmarks.half_products import native
from benchmarks.numbers import cells
from benchmarks.tasks import TASKS, Task

QUICK_STEPS = 3
PRECISIONS = tuple(dict.fromkeys(name for task in TASKS.values() for name in task.precisions("cuda")))
DEVICE = ("commit", "cpu", "gpu", "half_products")
"""What of an earlier result's environment must be the same for its runs to be kept."""


def run(task: str, precision: str, seed: int, steps: int, accelerator: str) -> dict[str, Any]:
    """One run, in a process that may have done others: whatever is random starts from the seed."""
    figure = TASKS[task].run(precision, seed, steps, accelerator)
    return {"task": task, "precision": precision, "seed": seed, "steps": steps, "figure": figure}


def summary(runs: Sequence[dict[str, Any]], accelerator: str) -> list[dict[str, Any]]:
    """For each task: what it is, and a row for each precision that has been trained, as has what it is held against."""
    tables = []
    for task in TASKS.values():
        own = [run for run in runs if run["task"] == task.name]
        figures: dict[str, dict[int, float | None]] = {}
        for one in own:
            figures.setdefault(one["precision"], {})[one["seed"]] = one["figure"]
        rows = [
            row(task, precision, figures[precision], figures[task.reference_of(precision)])
            for precision in task.precisions(accelerator)
            if precision in figures and task.reference_of(precision) in figures
        ]
        if rows:
            about = {"task": task.name, "what": task.what, "unit": task.unit, "clips": task.clips}
            tables.append({**about, "steps": own[0]["steps"], "rows": rows})
    return tables


def row(
    task: Task, precision: str, figures: Mapping[int, float | None], references: Mapping[int, float | None]
) -> dict[str, Any]:
    """A precision's mean and spread, and how they stand to those of FP32. None in `figures` is a run that diverged."""
    reference = task.reference_of(precision)
    finite = [figure for figure in figures.values() if figure is not None]
    told = {"precision": precision, "reference": reference, "seeds": len(figures)}
    if len(finite) < len(figures):
        return {**told, **dict.fromkeys(("mean", "lowest", "highest", "mean_difference")), "verdict": "diverged"}
    mean, spread = statistics.mean(finite), [figure for figure in references.values() if figure is not None]
    paired = [figures[seed] - references[seed] for seed in figures if references.get(seed) is not None]  # type: ignore[operator]
    verdict = "better" if mean < min(spread) else "worse" if mean > max(spread) else "inside"
    return {
        **told,
        "mean": mean,
        "lowest": min(finite),
        "highest": max(finite),
        "mean_difference": statistics.mean(paired) if paired else None,
        "verdict": None if precision == reference or len(spread) < 2 else verdict,
    }


def show(tables: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table for each task, within 60 columns."""
    for one in tables:
        title = f"{one['task']}: {one['unit']}, {one['steps']} steps"
        head = ("precision", "mean", "its seeds", "- FP32", "spread")
        table = Table(*head, title=title, box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for own in one["rows"]:
            table.add_row(*cells(own))
        console.print(table, "")


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing, print, and write the JSON. Returns MISSED where one of ours is worse than FP32's seeds."""
    description = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=description)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=tuple(TASKS), metavar="NAME", help=", ".join(TASKS))
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS, metavar="NAME")
    parser.add_argument("--seeds", type=int, help="how many seeds (default: 3; with --quick 1)")
    parser.add_argument("--steps", type=int, help=f"of every task (default: each its own; with --quick {QUICK_STEPS})")
    parser.add_argument("--quick", action="store_true", help="a few steps, one seed, results in results/quick")
    parser.add_argument("--accelerator", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--out", type=Path, help="where the JSON goes (default: results/accuracy_ACCELERATOR.json)")
    arguments = parser.parse_args(argv)

    accelerator = arguments.accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
    asked = arguments.steps or (QUICK_STEPS if arguments.quick else None)
    steps = {name: asked or task.steps for name, task in TASKS.items()}
    seeds = arguments.seeds or (1 if arguments.quick else 3)
    out = arguments.out or result_path(f"accuracy_{accelerator}", quick=arguments.quick)
    threads = max(1, (os.cpu_count() or 1) // arguments.jobs)
    where = described(sys.argv[1:] if argv is None else argv, accelerator, threads)
    runs = kept(out, where, steps)
    done = {(run["task"], run["precision"], run["seed"]) for run in runs}
    todo = [
        (name, precision, seed)
        for seed in range(seeds)
        for name in arguments.task
        for precision in TASKS[name].precisions(accelerator)
        if precision in arguments.precision and (name, precision, seed) not in done
    ]

    console = Console()
    with Progress(console=console) as progress, workers(arguments.jobs, threads) as pool:
        futures = [pool.submit(run, *case, steps[case[0]], accelerator) for case in todo]
        bar = progress.add_task("training", total=len(futures))
        try:
            for future in as_completed(futures):
                runs.append(future.result())
                write_result(out, {"environment": where, "runs": runs, "summary": summary(runs, accelerator)})
                progress.advance(bar)
        finally:
            pool.shutdown(cancel_futures=True)  # where one has failed, the others need not begin
    tables = summary(runs, accelerator)
    show(tables, console)
    rows = [row for table in tables for row in table["rows"] if row["precision"].startswith("mpt-")]
    return MISSED if any(row["verdict"] in ("worse", "diverged") for row in rows) else 0


def workers(jobs: int, threads: int) -> ProcessPoolExecutor:
    """Fresh processes, one for each run at a time. A GPU cannot be used in a forked one."""
    fresh = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, fresh, initializer=torch.set_num_threads, initargs=(threads,))


def described(argv: Sequence[str], accelerator: str, threads: int) -> dict[str, Any]:
    """Where the runs are made, and whose half products they have."""
    where = environment("benchmarks.accuracy", [f'"{one}"' if " " in one else one for one in argv])
    if accelerator == "cpu":
        own = "the CPU's own" if native() else "FP32 products of half operands, rounded to half"
        return {**where, "cpu_threads": threads, "gpu": None, "half_products": own}
    return {**where, "half_products": "the GPU's own"}


def kept(path: Path, where: Mapping[str, Any], steps: Mapping[str, int]) -> list[dict[str, Any]]:
    """The runs in an earlier result that are of the same commit and device, and as long."""
    result = earlier(path, where, DEVICE)
    runs = [] if result is None else result["runs"]
    return [run for run in runs if "task" in run and run["steps"] == steps[run["task"]]]


if __name__ == "__main__":
    sys.exit(main())
