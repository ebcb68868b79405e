"""`lightning-mpt compare` as a command: what it asks for, prints, keeps and refuses."""

import contextlib
import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lightning_mpt.cli import compare as command
from lightning_mpt.cli import main
from lightning_mpt.profiler import MemoryReport
from lightning_mpt.profiler.compare.run import FAILED, OK, Job, Row, base_of, to_json
from lightning_mpt.profiler.compare.target import Target

from .test_claims import report

HERE = str(Path(__file__).parent / "trained.py")


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put on the import path is taken off again."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_the_first_that_worked_is_the_base() -> None:
    failed = Row("32-true", FAILED, error="no")
    assert base_of([failed]) is None
    (content,) = to_json([failed])
    assert (content["status"], content["error"], content["peak_bytes"], content["categories"]) == (
        FAILED,
        "no",
        None,
        {},
    )


def test_what_a_network_s_file_prints_is_no_part_of_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run_job", lambda job, *_, **__: Row(job.precision, OK, report(weights=1)))
    file = tmp_path / "talks.py"
    file.write_text("import lightning as L\nprint('imported')\nclass Talks(L.LightningModule): ...\n")
    arguments = ["--model", f"{file}:Talks", "--precision", "32-true", "--accelerator", "cpu", "--json"]
    assert main(["compare", *arguments]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["status"] == OK
    assert "imported" in printed.err


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, str, Path]:
    """A real comparison of two precisions: exit code, JSON and reports."""
    folder = tmp_path_factory.mktemp("compared")
    printed = io.StringIO()
    arguments = ["--model", f"{HERE}:WithData", "--model.width=64", "--steps", "2", "--accelerator", "cpu"]
    precisions = ["--precision", "32-true", "--precision", "mpt-bf16-true"]
    with contextlib.redirect_stdout(printed):
        code = main(["compare", *arguments, *precisions, "--save", str(folder / "kept"), "--json"])
    return code, printed.getvalue(), folder / "kept"


@pytest.mark.slow
def test_the_command_compares(compared: tuple[int, str, Path]) -> None:
    code, printed, _ = compared
    assert code == 0
    rows = json.loads(printed)
    assert [(row["precision"], row["status"]) for row in rows] == [("32-true", OK), ("mpt-bf16-true", OK)]
    full, ours = rows
    for row in (full, ours):
        assert sum(row["categories"].values()) == row["peak_bytes"]
        assert row["step_seconds"] > 0
    assert full["saved_bytes"] == 0
    assert ours["saved_bytes"] == full["peak_bytes"] - ours["peak_bytes"]
    assert ours["categories"]["weights"] * 2 == full["categories"]["weights"]
    assert ours["categories"]["master_weights"] == ours["categories"]["weights"]
    assert [claim["about"] for claim in full["claims"]] == ["activations", "gradients", "weights"]
    assert [claim["about"] for claim in ours["claims"]] == ["saved"]


@pytest.mark.slow
def test_the_command_keeps_the_reports(compared: tuple[int, str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    _, printed, folder = compared
    assert sorted(path.name for path in folder.iterdir()) == ["32-true.json", "mpt-bf16-true.json"]
    assert MemoryReport.load(folder / "32-true.json").peak_bytes == json.loads(printed)[0]["peak_bytes"]
    assert main(["report", str(folder / "32-true.json"), str(folder / "mpt-bf16-true.json")]) == 0
    assert "saved" in capsys.readouterr().out


def run_as(monkeypatch: pytest.MonkeyPatch, run: Callable[[Job], Row]) -> None:
    monkeypatch.setattr(command, "run_job", lambda job, *_, **__: run(job))


BASE = ["compare", "--model", f"{HERE}:WithData", "--accelerator", "cpu"]


def test_the_default_precisions_are_those_that_a_cpu_has(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked: list[Job] = []

    def run(job: Job) -> Row:
        asked.append(job)
        return Row(job.precision, FAILED, error="no")

    run_as(monkeypatch, run)
    assert main([*BASE, "--seed", "5", "--model.width", "3"]) == 1  # none worked
    assert [job.precision for job in asked] == list(command.ON_CPU)
    assert {(job.steps, job.warmup_steps, job.seed, job.accelerator) for job in asked} == {(3, 2, 5, "cpu")}
    assert asked[0].target == Target(f"{HERE}:WithData", {"width": "3"})
    assert "mpt-bf16-true:compact failed: no" in capsys.readouterr().out


def test_ctrl_c_prints_what_there_is(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def run(job: Job) -> Row:
        if job.precision != "32-true":
            raise KeyboardInterrupt
        return Row(job.precision, FAILED, error="the first")

    run_as(monkeypatch, run)
    assert main(BASE) == 130
    out, err = capsys.readouterr()
    assert "the first" in out
    assert "interrupted after 1 of 5" in err


def test_a_half_without_masters_is_remarked_on(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    run_as(monkeypatch, lambda job: Row(job.precision, OK, report(weights=100, activations=300)))
    assert main([*BASE, "--precision", "32-true", "bf16-true"]) == 0
    assert "bf16-true: no FP32 master weights" in capsys.readouterr().out
    assert main([*BASE, "--precision", "32-true", "mpt-bf16-true"]) == 0
    assert "no FP32 master weights" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", f"{HERE}:Tinny"], "Did you mean Tiny?"),
        (["--model", f"{HERE}:Tiny", "--model.wdith", "3"], "Did you mean width?"),
        ([], "name a LightningModule by --model MODULE:CLASS"),
        ([*BASE[1:], "--precision", "mpt-bf16-tru"], "Did you mean"),
        ([*BASE[1:], "--steps", "0"], "at least 1 step is counted"),
        ([*BASE[1:], "--timeout", "0"], "give a number of seconds above 0"),
        ([*BASE[1:3], "--accelerator", "cuda"], "torch sees no CUDA device here"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(arguments: list[str], said: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["compare", *arguments]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stepps", "3"], "--stepps is unknown to lightning-mpt compare: did you mean --steps?"),
        (["--zzz"], "and --model.NAME and --data.NAME for the constructors' arguments"),
        (["--model.width"], "--model.width needs a value"),
        (["--model.", "3"], "needs a name after the dot"),
        (["--model.width", "3", "--model.width=4"], "--model.width is given twice: '3' and '4'"),
    ],
)
def test_an_unknown_option_is_refused_with_the_nearest(arguments: list[str], said: str, capsys) -> None:
    with pytest.raises(SystemExit) as info:
        main([*BASE, *arguments])
    assert info.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_value_may_look_like_an_option(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    asked: list[Job] = []
    run_as(monkeypatch, lambda job: asked.append(job) or Row(job.precision, FAILED, error="no"))
    assert main([*BASE, "--model.lr", "-1e-3", "--precision", "32-true"]) == 1
    assert asked[0].target.model_arguments == {"lr": "-1e-3"}


def test_options_of_a_target_are_not_for_other_commands(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "a.json"), "--model.size", "3"])
    assert "--model.size is unknown to lightning-mpt report" in capsys.readouterr().err
    assert os.environ.get("PYTHONFAULTHANDLER") is None  # that is for the runs
