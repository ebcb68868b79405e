"""The pytest plugin that runs Lightning's own tests under a precision, and keeps what became of each.

`lightning_suite.py` starts pytest with it. It is told by the environment:

LIGHTNING_SUITE_PRECISION   the precision of every Trainer that a test makes without one of its own; with BARE at its
                            end, our plugin adds nothing to what is logged, saved and called
LIGHTNING_SUITE_OUTCOMES    the file to write to: JSON lines of a test, its outcome, and what went wrong

A test is written down when it starts, too, and one that came to an end is not run again. So where a test ends the
interpreter, pytest need only be started once more.
"""

import faulthandler
import functools
import json
import os
import signal
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from lightning.fabric.plugins.precision import Precision
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import Strategy

from lightning_mpt import MasterWeightPrecision
from lightning_mpt.precisions import trainer_arguments

PRECISION, OUTCOMES = "LIGHTNING_SUITE_PRECISION", "LIGHTNING_SUITE_OUTCOMES"
BARE = " bare"
TEST_SECONDS = 30
"""A test that takes longer fails: some wait for processes that never come."""
STUCK_SECONDS = 90
"""One that cannot even be interrupted, or a fixture, ends the interpreter."""
STARTED, FINISHED = "started", "finished"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "flaky: of pytest-rerunfailures, which need not be installed")
    precision = os.environ[PRECISION]
    _give_trainers(precision.removesuffix(BARE))
    if precision.endswith(BARE):
        _add_nothing()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    known = read(Path(os.environ[OUTCOMES]))
    items[:] = [item for item in items if item.nodeid not in known]


def pytest_runtest_logstart(nodeid: str) -> None:
    faulthandler.dump_traceback_later(STUCK_SECONDS, exit=True)  # in place of the last test's
    _write(os.environ[OUTCOMES], nodeid, STARTED)


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


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _write(os.environ[OUTCOMES], report.nodeid, report.outcome, report.longreprtext)


def pytest_sessionfinish() -> None:
    _write(os.environ[OUTCOMES], "", FINISHED)


def read(outcomes: Path) -> dict[str, tuple[str, str]]:
    """The last word on each test that came to an end: `passed`, `failed` or `skipped`, and what went wrong.

    Under `""` it says FINISHED where pytest went to the end.
    """
    last = {name: (outcome, problem) for name, outcome, problem in _rows(outcomes)}
    return {name: (outcome, problem) for name, (outcome, problem) in last.items() if outcome != STARTED}


def blame(outcomes: Path) -> None:
    """After pytest is gone: a test that was started last and came to no end has failed."""
    rows = _rows(outcomes)
    if rows and rows[-1][1] == STARTED:
        _write(outcomes, rows[-1][0], "failed", "it ended the interpreter, or hung")


def _rows(outcomes: Path) -> list[list[str]]:
    return [json.loads(row) for row in outcomes.read_text(encoding="utf-8").splitlines()] if outcomes.exists() else []


def _write(outcomes: str | Path, name: str, outcome: str, problem: str = "") -> None:
    with open(outcomes, "a", encoding="utf-8") as file:
        print(json.dumps([name, outcome, problem]), file=file)


def _give_trainers(precision: str) -> None:
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


def _add_nothing() -> None:
    """No metrics and callbacks of the plugin, and no entry in checkpoints: what some tests count."""
    original = MasterWeightPrecision._attach

    def attach(self: MasterWeightPrecision, module: Any, lr_schedulers: list[Any]) -> None:
        original(self, module, lr_schedulers)
        module.trainer.callbacks[:] = [
            one for one in module.trainer.callbacks if one not in (self._reloads, self._metrics)
        ]

    MasterWeightPrecision._attach = attach  # type: ignore[method-assign]
    MasterWeightPrecision.state_dict = lambda self: {}  # type: ignore[method-assign]
