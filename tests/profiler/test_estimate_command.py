"""`lightning-mpt estimate` as a command."""

import json
import signal
import sys
from pathlib import Path

import pytest

from lightning_mpt.cli import main
from lightning_mpt.cli.estimate import size_in_bytes
from lightning_mpt.profiler import MemoryReport

HERE = str(Path(__file__).parent / "trained.py")
MODEL = ["--model", f"{HERE}:WithData", "--model.width=64"]


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put on the import path is taken off again."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_rows_have_what_those_of_compare_have_and_the_further_answers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    precisions = ["--precision", "32-true", "bf16-true"]
    further = ["--device", "cpu", "--memory", "200KB", "--ranks", "4", "--save", str(tmp_path / "kept")]
    assert main(["estimate", *MODEL, *precisions, *further, "--json"]) == 0
    full, ours = json.loads(capsys.readouterr().out)
    assert [full["precision"], full["status"], full["saved_bytes"]] == ["32-true", "ok", 0]
    assert ours["categories"]["weights"] * 2 == full["categories"]["weights"]
    assert ours["largest_batch"] > full["largest_batch"] > 4
    assert full["memory_bytes"] == 200_000
    assert full["per_rank"]["ranks"] == 4
    assert full["per_rank"]["ddp_bytes"] == full["peak_bytes"] + full["categories"]["weights"]
    assert ours["per_rank"]["ddp_bytes"] == ours["peak_bytes"] + ours["categories"]["weights"]
    saved = MemoryReport.load(tmp_path / "kept" / "32-true.json")
    assert saved.peak_bytes == full["peak_bytes"]
    assert {forward.time_ns for forward in saved.forwards.values()} == {0}


def test_the_call_is_that_of_compare(capsys: pytest.CaptureFixture[str]) -> None:
    """What only a run needs is taken, and changes nothing."""
    printed = []
    for call in ([], ["--steps", "5", "--seed", "1", "--timeout", "60"]):
        assert main(["estimate", *MODEL, "--precision", "32-true", "--accelerator", "cpu", *call, "--json"]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    peaks = []
    for device in ("auto", "cuda"):
        assert main(["estimate", *MODEL, "--precision", "32-true", "--accelerator", device, "--json"]) == 0
        peaks.append(json.loads(capsys.readouterr().out)[0]["peak_bytes"])
    assert peaks[0] == peaks[1] != json.loads(printed[0])[0]["peak_bytes"]


def test_what_a_network_prints_is_no_part_of_the_answer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "talks.py"
    file.write_text(
        "import runpy\n"
        f"WithData = runpy.run_path({HERE!r})['WithData']\n"
        "print('imported')\n"
        "class Talks(WithData):\n"
        "    def training_step(self, batch, batch_idx):\n"
        "        print('training')\n"
        "        return super().training_step(batch, batch_idx)\n"
    )
    assert main(["estimate", "--model", f"{file}:Talks", "--precision", "32-true", "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out)[0]["status"] == "ok"
    assert printed.err.index("imported") < printed.err.index("training")


def test_ddp_cannot_be_where_gradients_are_released(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", *MODEL, "--precision", "mpt-bf16-true:minimal", "--ranks", "4", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["per_rank"]["ddp_bytes"] is None
    assert row["per_rank"]["fsdp2_bytes"] > 0


def test_the_table_fits_a_narrow_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    arguments = ["--precision", "32-true", "16-mixed", "--memory", "1MiB", "--ranks", "2", "--batch-size", "8"]
    assert main(["estimate", *MODEL, *arguments]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 60
    for text in ("estimated for cuda", "16-mixed", "largest batch in 1MiB", "none", "each of 2, FSDP2", "not measured"):
        assert text in " ".join(printed.split())


@pytest.mark.parametrize("model", ["ReadsANumber", "BuiltFromNumbers"])
def test_what_fakes_cannot_run_is_one_line(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--model", f"{HERE}:{model}", "--precision", "32-true", "--json"]) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["status"] == "failed"
    assert "trained.py:" in row["error"]
    assert "lightning-mpt compare" in row["error"]
    assert "\n" not in row["error"]


def test_where_another_batch_size_cannot_be_the_largest_is_unknown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--model", f"{HERE}:OfFour", "--precision", "32-true", "--memory", "1MiB"]) == 0
    assert "unknown" in capsys.readouterr().out


def test_so_is_one_that_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["estimate", "--model", f"{HERE}:WrongShape", "--precision", "32-true"]) == 1
    assert "RuntimeError" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory", "much"], "not a size"),
        (["--memory", "0GiB"], "not a size"),
        (["--ranks", "0"], "at least 1"),
        (["--batch-size", "-3"], "at least 1"),
        (["--precision", "fp8"], "fp8"),
        (["--model.wdth", "3"], "wdth"),
    ],
)
def test_wrong_input_ends_with_two_and_says_why(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["--model", f"{HERE}:WithData"]
    assert main(["estimate", *model, *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("24GiB", 24 * 2**30), ("80GB", 80 * 10**9), ("512M", 512 * 10**6), ("1.5 GiB", 3 * 2**29), ("100", 100)],
)
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


def ending(folder: Path, how: str) -> list[str]:
    """The model of a file whose training ends in its own way."""
    file = folder / "ends.py"
    file.write_text(
        "import runpy\n"
        f"WithData = runpy.run_path({HERE!r})['WithData']\n"
        "class Ends(WithData):\n"
        "    def training_step(self, batch, batch_idx):\n"
        f"        {how}\n"
    )
    return ["--model", f"{file}:Ends", "--precision", "32-true", "bf16-true"]


def test_a_network_that_ends_the_process_is_a_row_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["estimate", *ending(tmp_path, "raise SystemExit(0)"), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["failed", "failed"]
    assert "sys.exit(0)" in rows[0]["error"]


def test_ctrl_c_leaves_the_rows_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # Lightning turns Ctrl-C off for good
    lines = ("import torch", "if self.dtype != torch.float32: raise KeyboardInterrupt")
    model = ending(tmp_path, "\n        ".join([*lines, "return super().training_step(batch, batch_idx)"]))
    model[-1] = "mpt-bf16-true"
    assert main(["estimate", *model, "--json"]) == 130
    printed = capsys.readouterr()
    assert [row["precision"] for row in json.loads(printed.out)] == ["32-true"]
    assert "interrupted after 1 of 2" in printed.err
