"""The whole set of benchmarks in one command, piece by piece.

    python -m benchmarks                      # all that a CPU can tell, about an hour on two cores
    python -m benchmarks --accelerator cuda   # all that a GPU can tell; the default where there is one
    python -m benchmarks --quick              # some ten minutes: shows that everything runs, and touches no kept result
    python -m benchmarks --only throughput    # the pieces whose names begin so

A piece is a benchmark, or a part of one, in a process of its own with a limit to its time. Nothing else runs beside
it, since most of them measure time. One that fails, or is ended at its limit, is a line in the closing table, and the
others go on. Ctrl-C ends the piece that is running and leaves what is there. What came to its end at this commit is
not run again, so that the same command goes on where it was stopped; `--again` runs everything anew. In a tree whose
code differs from its commit, nobody can tell what was measured, and everything is run.

Exits 0 where every piece came to its end, 1 where one did not, and 130 after Ctrl-C. A goal that is missed is a result.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.common import MISSED, QUICK_RESULTS, RESULTS, ROOT, commit, without_paths, write_result
from benchmarks.processes import failure, run_guarded


class Piece(NamedTuple):
    """A line of the plan."""

    name: str
    command: str
    """A module of this package, and its arguments."""
    minutes: float
    """At most: what takes longer hangs. Two slow cores need about half of it."""
    quick_minutes: float | None
    """The same with --quick, where most of the time goes into starting; None where that would tell nothing."""


PLAN = {
    "cpu": (
        Piece("step_time", "step_time", 10, 3),
        Piece("memory", "memory", 12, 3),
        Piece("profiler", "profiler", 6, 3),
        Piece("estimate", "estimate", 10, 4),
        Piece("throughput", "throughput --accelerator cpu", 9, 3),
        Piece("networks", "networks", 20, 5),
        Piece("ablation", "ablation", 18, 4),
        Piece("accuracy", "accuracy --accelerator cpu", 35, 6),
        Piece("estimate of the CUDA check", "estimate_of_check", 3, None),
        Piece("numbers", "numbers", 1, None),
    ),
    "cuda": (
        Piece("cuda", "cuda", 7.9, None),
        Piece("throughput: GPT-2 124M", "throughput --accelerator cuda --network 'GPT-2 124M'", 7.5, 5),
        Piece("throughput: GPT-2 1.5B", "throughput --accelerator cuda --network 'GPT-2 1.5B'", 7.5, 5),
        Piece("throughput: ResNet-50", "throughput --accelerator cuda --network ResNet-50", 7.5, 5),
        Piece("estimate", "estimate --accelerator cuda", 7.5, 5),
        Piece("networks: GPT-2 small", "networks --measure --network 'GPT-2 small'", 7.5, 5),
        Piece("networks: GPT-2 medium", "networks --measure --network 'GPT-2 medium'", 7.5, 5),
        Piece("networks: GPT-2 large", "networks --measure --network 'GPT-2 large'", 7.5, 5),
        Piece("networks: GPT-2 XL", "networks --measure --network 'GPT-2 XL'", 7.5, 5),
        Piece("networks: BERT-base", "networks --measure --network BERT-base", 7.5, 5),
        Piece("networks: BERT-large", "networks --measure --network BERT-large", 7.5, 5),
        Piece("networks: ViT-B/16", "networks --measure --network ViT-B/16", 7.5, 5),
        Piece("networks: ResNet-50", "networks --measure --network ResNet-50", 7.5, 5),
        Piece("networks: AlexNet", "networks --measure --network AlexNet", 7.5, 5),
        Piece("networks: VGG-16", "networks --measure --network VGG-16", 7.5, 5),
        Piece("networks: GoogLeNet", "networks --measure --network GoogLeNet", 7.5, 5),
        Piece("networks: Inception v3", "networks --measure --network 'Inception v3'", 7.5, 5),
        Piece("accuracy: gpt", "accuracy --accelerator cuda --task gpt", 7.5, 5),
        Piece("accuracy: digits", "accuracy --accelerator cuda --task digits", 7.5, 5),
        Piece("accuracy: vit", "accuracy --accelerator cuda --task vit", 7.5, 5),
        Piece("accuracy: lstm", "accuracy --accelerator cuda --task lstm", 7.5, 5),
        Piece("accuracy: gan", "accuracy --accelerator cuda --task gan", 7.5, 5),
        Piece("numbers", "numbers", 1, None),
    ),
}

DONE, GOAL_MISSED, FAILED, TIMED_OUT, NOT_RUN = "done", "goal missed", "failed", "timed out", "not run"
COLOURS = {DONE: "green", GOAL_MISSED: "yellow", FAILED: "red", TIMED_OUT: "red", NOT_RUN: "dim"}


class Job(NamedTuple):
    """What is run: a piece of the plan, quick or not."""

    name: str
    command: tuple[str, ...]
    """What Python is given."""
    limit_s: float
    always: bool = False
    """Whether it is run each time, since it reads what the others write."""


class Outcome(NamedTuple):
    """How a job ended."""

    name: str
    status: str
    seconds: float = 0.0
    files: tuple[str, ...] = ()
    """The results that it wrote."""
    before: bool = False
    """Whether that was in an earlier call."""


def jobs(accelerator: str, *, quick: bool) -> Iterator[Job]:
    """The plan for an accelerator."""
    for piece in PLAN[accelerator]:
        minutes = piece.quick_minutes if quick else piece.minutes
        if minutes is not None:
            module, *arguments = shlex.split(piece.command)
            command = ("-m", f"benchmarks.{module}", *arguments, *(["--quick"] if quick else []))
            yield Job(piece.name, command, 60 * minutes, always=module == "numbers")


class Journal:
    """Which jobs came to their end, and how, at which commit: a small JSON file.

    Args:
        path: of the file, which need not exist.
        now: the commit that is being measured.
    """

    def __init__(self, path: Path, now: str) -> None:
        self._path, self._now = path, now
        self._known: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def recall(self, job: Job) -> Outcome | None:
        """How the job ended at this commit, if it did and its files are there."""
        known = self._known.get(shlex.join(job.command))
        if known is None or known["commit"] != self._now or self._now == "unknown" or self._now.endswith("+changes"):
            return None
        if not all((self._path.parent / name).exists() for name in known["files"]):
            return None
        return Outcome(job.name, known["status"], known["seconds"], tuple(known["files"]), before=True)

    def keep(self, job: Job, outcome: Outcome) -> None:
        """Remember a job that came to its end; forget one that did not."""
        self._known.pop(shlex.join(job.command), None)
        if outcome.status in (DONE, GOAL_MISSED):
            kept = {"commit": self._now, "status": outcome.status, "seconds": outcome.seconds, "files": outcome.files}
            self._known[shlex.join(job.command)] = kept
        write_result(self._path, self._known)


def run_all(todo: Sequence[Job], journal: Journal, folder: Path, console: Console, *, again: bool) -> list[Outcome]:
    """Run the jobs one after another. A KeyboardInterrupt ends the one that is running: it and the rest are not run.

    Args:
        todo: what to run.
        journal: knows what need not be run, and learns what was.
        folder: where results appear.
        console: gets the progress bar, and what a job that failed said last.
        again: run also what need not be.
    """
    outcomes: list[Outcome] = []
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(todo))
        for job in todo:
            progress.update(bar, description=f"{escape(job.name)}, at most {job.limit_s / 60:.0f} min")
            outcome = None if again or job.always else journal.recall(job)
            if outcome is None:
                try:
                    outcome = run_one(job, folder, console)
                except KeyboardInterrupt:
                    return outcomes + [Outcome(left.name, NOT_RUN) for left in todo[len(outcomes) :]]
                journal.keep(job, outcome)
            outcomes.append(outcome)
            progress.advance(bar)
    return outcomes


def run_one(job: Job, folder: Path, console: Console) -> Outcome:
    """Run a job, and see which results in `folder` it wrote."""
    before = written(folder)
    begun = time.monotonic()
    status, output = run_guarded([sys.executable, *job.command], job.limit_s, ROOT)
    seconds = round(time.monotonic() - begun, 1)
    files = tuple(sorted(name for name, when in written(folder).items() if before.get(name) != when))
    how = {None: TIMED_OUT, 0: DONE, MISSED: GOAL_MISSED}.get(status, FAILED)
    if how in (TIMED_OUT, FAILED):
        last = "\n".join(without_paths(output).splitlines()[-20:])
        console.print(f"[red]{escape(job.name)} {failure(status, job.limit_s)}.[/red] What it said last:")
        console.print(last, markup=False, highlight=False)
    return Outcome(job.name, how, seconds, files)


def written(folder: Path) -> dict[str, int]:
    """The results in a folder, with when they were written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[!.]*.json")}


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the closing table."""
    table = Table("piece", "status", "seconds", "file")
    for outcome in outcomes:
        status = f"[{COLOURS[outcome.status]}]{outcome.status}" + (", before" if outcome.before else "")
        seconds = "" if outcome.status == NOT_RUN else f"{outcome.seconds:.0f}"
        table.add_row(escape(outcome.name), status, seconds, "\n".join(outcome.files))
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the set. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--accelerator", choices=tuple(PLAN), help="default: cuda where there is a GPU")
    parser.add_argument("--quick", action="store_true", help="everything short; results go to benchmarks/results/quick")
    parser.add_argument("--only", default="", metavar="NAME", help="the pieces whose name begins with this")
    parser.add_argument("--again", action="store_true", help="run also what came to its end at this commit")
    arguments = parser.parse_args(argv)
    accelerator = arguments.accelerator or ("cuda" if torch.cuda.is_available() else "cpu")
    todo = [job for job in jobs(accelerator, quick=arguments.quick) if job.name.startswith(arguments.only)]
    if not todo:
        names = ", ".join(job.name for job in jobs(accelerator, quick=arguments.quick))
        parser.error(f"--only {arguments.only!r}: no piece's name begins so. There are: {names}")
    console = Console()
    folder = QUICK_RESULTS if arguments.quick else RESULTS
    outcomes = run_all(todo, Journal(folder / ".set.json", commit()), folder, console, again=arguments.again)
    show(outcomes, console)
    statuses = {outcome.status for outcome in outcomes}
    if NOT_RUN in statuses:
        return 130
    return 1 if statuses & {FAILED, TIMED_OUT} else 0


if __name__ == "__main__":
    sys.exit(main())
