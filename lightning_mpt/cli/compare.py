"""`lightning-mpt compare`: the same network under several precisions, each in a fresh process, side by side."""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..precisions import check_name
from ..profiler.compare.run import Job, Row, base_of, run_job, to_json
from .target_options import CommandParser, add_output, add_precisions, add_target, read_target

CHILD = [sys.executable, "-m", "lightning_mpt.cli.compare_child"]
ON_CPU = ("32-true", "bf16-mixed", "bf16-true", "mpt-bf16-true", "mpt-bf16-true:compact")
ON_CUDA = ("32-true", "16-mixed", "bf16-mixed", "16-true", "mpt-16-true", "mpt-16-true:compact")
INTERRUPTED = 130
"""The exit code of a command that Ctrl-C ended, as shells have it."""


def declare(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    add_target(parser)
    add_precisions(parser, f"{', '.join(ON_CPU)} on CPU, {', '.join(ON_CUDA)} on a GPU")
    parser.add_argument("--steps", type=int, default=3, help="steps to count, after 2 to warm up (default: 3)")
    parser.add_argument("--accelerator", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0, help="the same for all (default: 0)")
    parser.add_argument(
        "--timeout", type=float, default=600.0, help="seconds that one precision may take (default: 600)"
    )
    add_output(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command: 0, or 1 where no precision worked. Raises OSError or ValueError where the input is wrong."""
    target = read_target(options)
    accelerator = _accelerator(options.accelerator)
    names = options.precision or (ON_CUDA if accelerator == "cuda" else ON_CPU)
    precisions = [check_name(name) for name in dict.fromkeys(names)]
    if options.steps < 1:
        raise ValueError(f"--steps {options.steps}: at least 1 step is counted")
    if not options.timeout > 0:
        raise ValueError(f"--timeout {options.timeout:g}: give a number of seconds above 0")
    with redirect_stdout(sys.stderr):  # what a network's file prints is no part of the answer
        target.check()
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)

    jobs = [Job(target, precision, accelerator, options.steps, seed=options.seed) for precision in precisions]
    rows: list[Row] = []
    interrupted = False
    try:
        _run(jobs, rows, timeout_s=options.timeout, save_to=options.save)
    except KeyboardInterrupt:
        interrupted = True
    if options.json:
        print(json.dumps(to_json(rows), indent=1))
    else:
        from ..profiler.show.comparison import print_rows

        print_rows(rows, f"{target} on {accelerator}, the peak of {options.steps} steps", remarks=_remarks(rows))
    if interrupted:
        print(f"lightning-mpt compare: interrupted after {len(rows)} of {len(precisions)}", file=sys.stderr)
        return INTERRUPTED
    return 0 if base_of(rows) is not None else 1


def _run(jobs: Sequence[Job], rows: list[Row], **options: Any) -> None:
    """Run the jobs and add their rows, with a bar of all batches on stderr meanwhile, if that is a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        for number, job in enumerate(jobs, 1):
            # Batches that are only timed may not be there, and of those that accumulate there are more than steps.
            task = progress.add_task(f"{job.precision} ({number} of {len(jobs)}), steps", total=job.batches)
            rows.append(
                run_job(job, CHILD, watch=lambda done, task=task: progress.update(task, completed=done), **options)
            )
            progress.remove_task(task)


def _remarks(rows: Sequence[Row]) -> list[str]:
    """What the bytes alone do not say."""
    bare = [row.precision for row in rows if row.precision in ("16-true", "bf16-true") and row.report is not None]
    if not bare:
        return []
    return [f"{' and '.join(bare)}: no FP32 master weights, so that updates below half a unit of 16 bits are lost."]


def _accelerator(name: str) -> str:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("--accelerator cuda: torch sees no CUDA device here. Leave it out, or give cpu.")
    return name if name != "auto" else "cuda" if there else "cpu"
