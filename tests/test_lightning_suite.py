"""The tool that runs Lightning's own tests finds what is lost under the plugin, on a checkout of three tests."""

from pathlib import Path

import pytest

from benchmarks import lightning_differences, lightning_suite
from benchmarks.lightning_suite import OURS, THEIRS, folders, lost, pass_once_more, result, run_all
from benchmarks.lightning_suite_plugin import BARE

TESTS = """
import os
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.plugins.precision import HalfPrecision

def test_with_its_own_precision():
    assert Trainer(precision="32-true", accelerator="cpu").precision == "32-true"

def test_that_theirs_alone_passes():
    assert isinstance(Trainer(accelerator="cpu").precision_plugin, HalfPrecision)

def test_that_ends_the_interpreter():
    isinstance(Trainer(accelerator="cpu").precision_plugin, HalfPrecision) or os._exit(1)

def test_after_the_end():
    assert Trainer(accelerator="cpu").precision == "bf16-true"

def test_that_counts_metrics(tmp_path):
    trainer = Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )
    trainer.fit(BoringModel())
    assert not trainer.callback_metrics
"""


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkout")
    (root / "tests" / "tests_pytorch" / "core").mkdir(parents=True)
    (root / "tests" / "tests_pytorch" / "core" / "test_few.py").write_text(TESTS, encoding="utf-8")
    run_all(root, ["tests_pytorch"], root / "outcomes", jobs=2)
    return root


@pytest.mark.slow
def test_what_theirs_alone_passes_is_lost_and_an_ended_interpreter_loses_no_more(checkout: Path) -> None:
    runs = run_all(checkout, ["tests_pytorch"], checkout / "outcomes", jobs=1)
    file = "tests_pytorch/core/test_few.py"
    assert {name: outcome for name, (outcome, _) in runs[OURS].items()} == {
        f"{file}::test_with_its_own_precision": "passed",
        f"{file}::test_that_theirs_alone_passes": "failed",
        f"{file}::test_that_ends_the_interpreter": "failed",
        f"{file}::test_after_the_end": "passed",
        f"{file}::test_that_counts_metrics": "failed",
    }
    assert {outcome for outcome, _ in runs[THEIRS].values()} == {"passed"}
    alone = ("that_theirs_alone_passes", "that_ends_the_interpreter", "that_counts_metrics")
    assert list(lost(runs)) == [f"{file}::test_{name}" for name in alone]
    assert result(runs)["folders"]["core"] == {THEIRS: {"passed": 5}, OURS: {"passed": 2, "failed": 3}}


@pytest.mark.slow
def test_what_passes_where_the_plugin_adds_nothing_has_counted_what_it_adds(checkout: Path) -> None:
    tests = [f"tests_pytorch/core/test_few.py::test_that_{name}" for name in ("counts_metrics", "theirs_alone_passes")]
    assert pass_once_more(checkout, tests, OURS + BARE, checkout / "outcomes") == set(tests[:1])


def test_only_what_has_no_reason_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two, three = (f"tests_pytorch/core/test_few.py::test_{name}" for name in ("one", "two", "three"))
    runs = {
        THEIRS: dict.fromkeys((one, two, three), ("passed", "")),
        OURS: {one: ("failed", "E: x"), two: ("failed", "")},
    }
    monkeypatch.setattr(lightning_suite, "run_all", lambda *_: runs)
    monkeypatch.setattr(lightning_suite, "pass_once_more", lambda _, tests, precision, *__: again[precision])
    again = {OURS: set[str](), OURS + BARE: {two}}
    reasons = {"It is not ours.": (one.removeprefix("tests_pytorch/"),)}
    monkeypatch.setattr(lightning_differences, "REASONS", reasons)
    assert lightning_suite.main([str(tmp_path), "tests_pytorch/core"]) == 1  # three was not run
    assert f"alone: {three}\n    it was not run" in capsys.readouterr().out
    runs[OURS][three] = ("passed", "")
    assert lightning_suite.main([str(tmp_path), "tests_pytorch/core"]) == 0
    printed = capsys.readouterr().out
    assert f"It is not ours.\n    {one}" in printed
    assert f"{lightning_differences.ADDED}\n    {two}" in printed
    reasons.clear()
    assert lightning_suite.main([str(tmp_path), "tests_pytorch/core"]) == 1
    again[OURS] = {one}
    assert lightning_suite.main([str(tmp_path), "tests_pytorch/core"]) == 0


def test_files_are_run_by_the_folder_that_they_are_in(tmp_path: Path) -> None:
    files = ["core/test_one.py", "core/test_two.py", "core/deep/test_three.py"]
    for file in files:
        path = tmp_path / "tests" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert folders(tmp_path, ["core"]) == {"core/deep": files[2:], "core": files[:2]}
    assert folders(tmp_path, ["core/test_two.py"]) == {"core/test_two.py": files[1:2]}  # not in the folder's place


def test_a_reason_holds_for_all_parameters_of_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightning_differences, "REASONS", {"why": ("a/test_b.py::test_c", "a/test_b.py::test_d[1]")})
    for name, why in {
        "test_c": "why",
        "test_c[1]": "why",
        "test_cc": None,
        "test_d[1]": "why",
        "test_d[2]": None,
    }.items():
        assert lightning_differences.reason(f"tests_pytorch/a/test_b.py::{name}") == why
