"""Lightning's own tests under the plugin: whatever passes in Lightning's `bf16-true` must pass in ours.

    git clone --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning lightning-checkout
    python -m benchmarks.lightning_suite lightning-checkout [tests_pytorch/callbacks ...]

Every Trainer that a test makes without a precision of its own is given one: in a first run `precision="bf16-true"`, in
a second `plugins=[MasterWeightPrecision("bf16-true")]`. All on the CPU, a process for each folder. Printed are the
counts, and each test that passes in the first run alone, also at a second try. Such a test is run with a plugin that
adds nothing to what is logged, saved and called: what passes then has counted that. For others
`lightning_differences.py` may know a reason; else the command exits with 1. Lightning's wheel does not hold its tests,
hence the checkout.

What became of each test is kept in the folder that `--outcomes` names, and what is there is not run again: a run that
was cut short goes on. Delete the files there of what is to be run anew.
"""

import argparse
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.common import RESULTS, ROOT, environment, write_result
from benchmarks.lightning_differences import ADDED, reason
from benchmarks.lightning_suite_plugin import BARE, OUTCOMES, PRECISION, blame, read

THEIRS, OURS = "bf16-true", "mpt-bf16-true"
RESULT = RESULTS / "lightning_suite.json"
OTHER_PROCESSES = ("ddp", "spawn", "fork", "fsdp", "deepspeed", "standalone", "kill", "spike")
"""Tests with these in their names start processes, in which there would be no plugin."""
Runs = dict[str, dict[str, tuple[str, str]]]
"""Precision -> test -> outcome, and what went wrong."""


def folders(checkout: Path, targets: Sequence[str]) -> dict[str, list[str]]:
    """The test files of the targets (files or folders below `tests`): what is run at once, by its name."""
    found: dict[str, list[str]] = {}
    for target in targets:
        path = checkout / "tests" / target
        if path.is_file():
            found[target] = [target]
        for file in sorted(path.rglob("test_*.py")):
            name = file.relative_to(checkout / "tests")
            found.setdefault(name.parent.as_posix(), []).append(name.as_posix())
    return found


def run(checkout: Path, tests: Sequence[str], precision: str, outcomes: Path) -> None:
    """Run tests (files, or single ones) under a precision; once more for the rest where one ended the interpreter."""
    command = [
        sys.executable, "-m", "pytest", "-q", "--tb=short", "--rootdir", str(checkout), "--color=no",
        "-p", "benchmarks.lightning_suite_plugin", "-p", "no:cacheprovider", "--continue-on-collection-errors",
        "-k", " and ".join(f"not {word}" for word in OTHER_PROCESSES), *tests,
    ]  # fmt: skip
    path = os.pathsep.join([str(ROOT), str(checkout / "tests"), os.environ.get("PYTHONPATH", "")])
    variables = {PRECISION: precision, OUTCOMES: str(outcomes), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    known = -1
    while "" not in read(outcomes) and len(read(outcomes)) > known:
        known = len(read(outcomes))
        with outcomes.with_suffix(".log").open("a", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                cwd=checkout / "tests",
                env={"OMP_NUM_THREADS": "1", **os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            process.wait()
            blame(outcomes)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what tests have left running


def run_all(checkout: Path, targets: Sequence[str], kept: Path, jobs: int) -> Runs:
    """Every folder's tests under both precisions, `jobs` at a time, with a bar for how far they are."""
    kept.mkdir(parents=True, exist_ok=True)
    parts = folders(checkout, targets)
    runs: Runs = {THEIRS: {}, OURS: {}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task("Lightning's tests", total=2 * len(parts))

        def part(folder: str, precision: str) -> None:
            outcomes = kept / f"{precision}.{folder.replace('/', '.')}.jsonl"
            progress.update(bar, description=f"{folder} under {precision}")
            run(checkout, parts[folder], precision, outcomes)
            runs[precision] |= {name.removeprefix("tests/"): outcome for name, outcome in read(outcomes).items()}
            progress.advance(bar)

        list(pool.map(lambda arguments: part(*arguments), [(f, p) for f in parts for p in (THEIRS, OURS)]))
    for outcomes in runs.values():
        outcomes.pop("", None)
    return runs


def lost(runs: Runs) -> dict[str, str]:
    """Tests that pass in the first run alone, with what went wrong in the second."""
    missing = ("failed", "it was not run")
    return {
        name: runs[OURS].get(name, missing)[1]
        for name, (outcome, _) in runs[THEIRS].items()
        if outcome == "passed" and runs[OURS].get(name, missing)[0] != "passed"
    }


def pass_once_more(checkout: Path, tests: Sequence[str], precision: str, kept: Path) -> set[str]:
    """Those of the tests that pass in another run under a precision."""
    outcomes = kept / f"{precision} once more.jsonl"
    outcomes.unlink(missing_ok=True)
    if tests:
        run(checkout, tests, precision, outcomes)
    return {name.removeprefix("tests/") for name, (outcome, _) in read(outcomes).items() if outcome == "passed"}


def result(runs: Runs, bare: Container[str] = ()) -> dict[str, Any]:
    """What is kept: counts by folder, and the lost tests, by reason. `bare`: those that pass where nothing is added."""
    counts: dict[str, dict[str, Counter[str]]] = {}
    for precision, outcomes in runs.items():
        for name, (outcome, _) in outcomes.items():
            folder = name.split("/")[1].partition("::")[0]
            counts.setdefault(folder, {THEIRS: Counter(), OURS: Counter()})[precision][outcome] += 1
    explained: dict[str, list[str]] = {}
    unexplained = []
    for name, problem in sorted(lost(runs).items()):
        # A test that took too long proves nothing by being quicker another time.
        if why := ADDED if name in bare and "TimeoutError" not in problem else reason(name):
            explained.setdefault(why, []).append(name)
        else:
            unexplained.append(name)
    return {"folders": dict(sorted(counts.items())), "explained": explained, "unexplained": unexplained}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lightning_suite", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("checkout", type=Path, help="Lightning's repository, at the version that is installed")
    parser.add_argument("targets", nargs="*", default=["tests_pytorch"], help="files or folders below tests")
    parser.add_argument("--outcomes", type=Path, help="where to keep each outcome (the checkout)")
    parser.add_argument("--jobs", type=int, default=1, help="how many folders to run at once")
    parser.add_argument("--out", type=Path, help=f"where to write the result ({RESULT.name} if all are run)")
    options = parser.parse_args(arguments)
    checkout = options.checkout.resolve()
    kept = (options.outcomes or checkout / "outcomes").resolve()
    runs = run_all(checkout, options.targets, kept, options.jobs)
    lucky = pass_once_more(checkout, list(lost(runs)), OURS, kept)  # on a busy machine some take too long
    runs[OURS].update(dict.fromkeys(lucky, ("passed", "")))
    problems = lost(runs)
    found = result(runs, pass_once_more(checkout, list(problems), OURS + BARE, kept))
    for precision, outcomes in runs.items():
        print(precision, dict(Counter(outcome for outcome, _ in outcomes.values())))
    for why, names in found["explained"].items():
        print(f"by design: {why}", *names, sep="\n    ")
    for name in found["unexplained"]:
        print(f"failed under {OURS} alone: {name}\n    {problems[name].strip()}")
    whole = options.targets == parser.get_default("targets")
    out = options.out or (RESULT if whole else None)
    if out is not None:
        where = environment("benchmarks.lightning_suite", ["lightning-checkout", *([] if whole else options.targets)])
        told = checkout / "src" / "version.info"
        tests_of = told.read_text(encoding="utf-8").strip() if told.exists() else None
        write_result(
            out, {"environment": where, "tests_of_lightning": tests_of, **found, "at_second_try": sorted(lucky)}
        )
    return len(found["unexplained"]) > 0


if __name__ == "__main__":
    sys.exit(main())
