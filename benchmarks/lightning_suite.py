"""Lightning's own tests under the plugin: whatever passes in Lightning's `bf16-true` must pass in ours.

    git clone --branch 2.6.5 https://github.com/Lightning-AI/pytorch-lightning lightning-checkout
    python -m benchmarks.lightning_suite lightning-checkout [tests_pytorch/callbacks ...] [--json OUT]

Every Trainer that a test makes without a precision of its own is given one: in a first run `precision="bf16-true"`, in
a second `plugins=[MasterWeightPrecision("bf16-true")]`. All on the CPU, in one process. Printed are the counts, and
each test that passes in the first run alone. Lightning's wheel does not hold its tests, hence the checkout. This module
is also the pytest plugin that the two runs are made with.
"""

import argparse
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.common import ROOT

THEIRS, OURS = "bf16-true", "mpt-bf16-true"
FOLDERS = ("trainer", "loops", "callbacks", "models", "checkpointing", "core", "tuner")
PRECISION, OUTCOMES = "LIGHTNING_SUITE_PRECISION", "LIGHTNING_SUITE_OUTCOMES"
OTHER_PROCESSES = ("ddp", "spawn", "fork", "fsdp", "deepspeed", "standalone", "kill")
"""Tests with these in their names start processes, in which there would be no plugin."""
TEST_SECONDS = 20
"""A test that takes longer fails: some wait for processes that never come."""


def pytest_configure(config: pytest.Config) -> None:
    """In the pytest that runs the suite: give Trainers a precision."""
    config.addinivalue_line("markers", "flaky: of pytest-rerunfailures, which need not be installed")
    if PRECISION in os.environ:
        _give_trainers(os.environ[PRECISION])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    def stop(*_: Any) -> None:
        raise TimeoutError(f"took over {TEST_SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(TEST_SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)


def _give_trainers(precision: str) -> None:
    from lightning.fabric.plugins.precision import Precision
    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import Strategy

    from lightning_mpt.precisions import trainer_arguments

    original = Trainer.__init__

    @functools.wraps(original)
    def init(self: Trainer, *args: Any, **kwargs: Any) -> None:
        plugins = kwargs.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list | tuple) else [plugins]
        strategy = kwargs.get("strategy")
        own = (
            kwargs.get("precision") is not None
            or any(isinstance(plugin, Precision) for plugin in plugins)
            or (isinstance(strategy, Strategy) and strategy._precision_plugin is not None)
        )
        if not own:
            given = trainer_arguments(precision)
            kwargs |= {**given, "plugins": [*plugins, *given.get("plugins", [])]}
        original(self, *args, **kwargs)

    Trainer.__init__ = init  # type: ignore[method-assign]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep each outcome at once: the last word on a test is what counts, and what went wrong before."""
    if OUTCOMES in os.environ and (report.when == "call" or report.outcome != "passed"):
        with open(os.environ[OUTCOMES], "a") as file:
            print(json.dumps([report.nodeid, report.outcome, report.longreprtext]), file=file)


def run(checkout: Path, targets: list[str], precision: str) -> dict[str, tuple[str, str]]:
    """Each test's outcome (`passed`, `failed`, `skipped`) under a precision, with what went wrong."""
    with tempfile.TemporaryDirectory() as folder:
        outcomes = Path(folder) / "outcomes.jsonl"
        outcomes.touch()
        path = os.pathsep.join([str(ROOT), str(checkout / "tests"), os.environ.get("PYTHONPATH", "")])
        command = [
            sys.executable, "-m", "pytest", "-q", "--tb=short", "--rootdir", str(checkout), "--color=no",
            "-p", "benchmarks.lightning_suite", "-p", "no:cacheprovider", "--continue-on-collection-errors",
            "-k", " and ".join(f"not {word}" for word in OTHER_PROCESSES), *targets,
        ]  # fmt: skip
        variables = {PRECISION: precision, OUTCOMES: str(outcomes), "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, cwd=checkout / "tests", env={**os.environ, **variables}, check=False)
        rows = map(json.loads, outcomes.read_text().splitlines())
        return {name: (outcome, problem) for name, outcome, problem in rows}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lightning_suite", description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="Lightning's repository, at the version that is installed")
    parser.add_argument("targets", nargs="*", default=[f"tests_pytorch/{name}" for name in FOLDERS])
    parser.add_argument("--json", type=Path, help="where to keep all outcomes")
    options = parser.parse_args(arguments)
    checkout = options.checkout.resolve()
    runs = {precision: run(checkout, options.targets, precision) for precision in (THEIRS, OURS)}
    if options.json is not None:
        options.json.write_text(json.dumps(runs, indent=1))
    for precision, outcomes in runs.items():
        print(precision, dict(Counter(kind for kind, _ in outcomes.values())))
    missing = ("failed", "it was not run")
    lost = {
        name: runs[OURS].get(name, missing)
        for name, (kind, _) in runs[THEIRS].items()
        if kind == "passed" and runs[OURS].get(name, missing)[0] != "passed"
    }
    for name, (kind, message) in lost.items():
        print(f"{kind} under {OURS} alone: {name}\n    {message.strip().splitlines()[-1:]}")
    return len(lost) > 0


if __name__ == "__main__":
    sys.exit(main())
