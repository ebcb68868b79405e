"""The CUDA check: everything that only a GPU can tell, in one command that needs no network and ends in eight minutes.

    python -m benchmarks.cuda                 # JSON to benchmarks/results/, a trace to tests/fixtures/cuda_trace.json
    python -m benchmarks.cuda --out FOLDER    # both to FOLDER as well
    python -m benchmarks.cuda --only tests train:xl    # pieces whose names begin so

It runs the tests marked `cuda`, records a short memory trace of a CUDA training step for the ledger's tests, times the
optimizer's step with the bandwidth that it reaches and cross entropy, trains GPT-2 with 124 million parameters and with
1.5 billion under every precision, and tells what recording costs. Every piece is a process of its own with its own
share of the time: one that fails, hangs or breaks the device leaves the others, and its error is kept in the JSON,
which is written anew after each piece.

Exits 0 where every piece came through, 1 where one did not, and 2 where there is no GPU.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape

from benchmarks.common import RESULTS, ROOT, environment, slug, without_paths, write_result
from benchmarks.processes import Guarded, failure, run_guarded

BUDGET_S = 450.0
FIXTURES = ROOT / "tests" / "fixtures"
PRECISIONS = (
    "mpt-16-true",
    "32-true",
    "16-mixed",
    "mpt-bf16-true:compact",
    "bf16-mixed",
    "mpt-bf16-true",
    "mpt-bf16-true:minimal",
    "16-true",
    "bf16-true",
)
MARK = "pytest.mark.cuda"
QUIET = ("-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short", "--show-capture=no")
"""For pytest: what fails is told in few lines, so that all of it is kept. A plugin for benchmarks, where there is one,
warns where tests run side by side."""
MANY_CPUS = 8
"""With so many, what starts disturbs nothing."""


class Piece(NamedTuple):
    """One measurement: its name (a word, then what it is of), and the most seconds it may take."""

    name: str
    limit_s: float


def plan() -> list[Piece]:
    """All pieces, what matters most first: time that runs out takes the last ones."""
    return [
        Piece("trace", 60.0),
        Piece("tests", 150.0),
        Piece("step:100M", 60.0),
        Piece("tensors:1000", 45.0),
        *(Piece(f"loss:{classes}", 30.0) for classes in (50257, 50304)),
        *(Piece(f"train:long:{precision}", 60.0) for precision in PRECISIONS),
        *(Piece(f"train:xl:{precision}", 60.0) for precision in PRECISIONS[:6]),
        Piece("step:1B", 60.0),
        *(Piece(f"recording:{length}", 45.0) for length in ("long", "short")),
        *(Piece(f"train:short:{precision}", 45.0) for precision in PRECISIONS[:6]),
        *(Piece(f"tensors:{count}", 45.0) for count in (10, 5000)),
        Piece("step:10M", 60.0),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pieces. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder that gets the JSON and the trace as well")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="run the pieces whose names begin so")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything (default: %(default)s)")
    arguments = parser.parse_args(argv)
    deadline = time.monotonic() + arguments.budget
    if not torch.cuda.is_available():
        print("benchmarks.cuda needs a CUDA device and this machine has none: nothing was run.", file=sys.stderr)
        return 2

    console = Console()
    started = environment("benchmarks.cuda", ["--only", *arguments.only] if arguments.only else [])
    stamp = datetime.now(timezone.utc).strftime("%Y-%m-%d-%H%M")
    name = f"cuda-{slug(started['gpu']['name'])}-{stamp}.json"
    folders = [RESULTS, *([arguments.out] if arguments.out else [])]
    result: dict[str, Any] = {"environment": started, "pieces": {}}
    pieces = [piece for piece in plan() if piece.name.startswith(tuple(arguments.only) or "")]
    starting = starts(pieces)
    for index, piece in enumerate(pieces, start=1):
        turn = next(starting)
        limit_s = min(piece.limit_s, deadline - time.monotonic() - 3.0)
        begun = time.monotonic()
        if limit_s < 5.0:
            outcome: dict[str, Any] = {"error": "left out: the time for the whole check had run out"}
        else:
            outcome = turn.run(limit_s)
        outcome["wall_s"] = round(time.monotonic() - begun, 1)
        if trace := outcome.pop("trace", None):
            outcome["trace_bytes"] = len(trace)
            for folder in (FIXTURES, *folders[1:]):
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "cuda_trace.json").write_text(trace, encoding="utf-8")
        result["pieces"][piece.name] = outcome
        for folder in folders:
            write_result(folder / name, result)
        word = f"[red]{escape(outcome['error'])}" if "error" in outcome else f"[green]{summary(outcome)}"
        console.print(f"{index}/{len(pieces)} {piece.name} {outcome['wall_s']:.0f} s: {word}", soft_wrap=True)
    console.print(f"written: benchmarks/results/{name}", highlight=False)
    return 1 if any("error" in outcome for outcome in result["pieces"].values()) else 0


class Started:
    """A piece of `benchmarks.cuda_pieces` in a fresh process, which imports what it needs and waits for its turn."""

    def __init__(self, name: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._answer = Path(self._folder.name) / "answer.json"
        command = [sys.executable, "-m", "benchmarks.cuda_pieces", name, str(self._answer)]
        self._process = Guarded(command, ROOT)

    def run(self, limit_s: float) -> dict[str, Any]:
        """Let it run, and return what it found."""
        status, output = self._process.finish(limit_s)
        if status == 0 and self._answer.exists():
            found: dict[str, Any] = json.loads(self._answer.read_text(encoding="utf-8"))
            return found
        return {"error": failure(status, limit_s), "output_tail": without_paths(output)[-4000:]}

    def end(self) -> None:
        """End it, whether or not it has had its turn."""
        self._process.end()
        self._folder.cleanup()


class Tests:
    """The tests marked `cuda`, in the place of a piece."""

    def run(self, limit_s: float) -> dict[str, Any]:
        return run_tests(limit_s)

    def end(self) -> None: ...


def start(name: str) -> "Started | Tests":
    """A piece by its name."""
    return Tests() if name == "tests" else Started(name)


def starts(pieces: Sequence[Piece]) -> Iterator["Started | Tests"]:
    """Every piece in its turn. Where there are processors for it, the next one starts meanwhile: to import takes
    seconds, for which a rented GPU need not wait."""
    begun: list[Started | Tests] = []
    ahead = 1 if (os.cpu_count() or 1) >= MANY_CPUS else 0
    try:
        for index in range(len(pieces)):
            begun += [start(piece.name) for piece in pieces[index + len(begun) : index + 1 + ahead]]
            yield begun[0]
            begun.pop(0).end()
    finally:
        for one in begun:
            one.end()


def run_tests(limit_s: float) -> dict[str, Any]:
    """Run the tests marked `cuda` and return pytest's closing line, and what failed.

    Only their files are imported: the others need packages that a rented machine may lack, and seconds that it costs.
    """
    parallel = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") else []
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    marked = [str(file.relative_to(ROOT)) for file in files if MARK in file.read_text(encoding="utf-8")]
    command = [sys.executable, "-m", "pytest", "-m", "cuda", "-q", *QUIET, "--durations=5", *parallel, *marked]
    status, output = run_guarded(command, limit_s, ROOT)
    lines = without_paths(output).splitlines()
    found: dict[str, Any] = {
        "closing_line": next((line for line in reversed(lines) if line.strip()), ""),
        "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))],
    }
    if status != 0:
        found["error"] = "no test is marked cuda" if status == 5 else failure(status, limit_s)
        found["output_tail"] = "\n".join(lines)[-12000:]
    return found


def summary(outcome: dict[str, Any]) -> str:
    """A piece's finding on one line."""
    return str(outcome.get("summary") or outcome.get("closing_line") or "done")


if __name__ == "__main__":
    sys.exit(main())
