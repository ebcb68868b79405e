"""The command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_mpt.cli import main
from lightning_mpt.profiler import MemoryReport
from lightning_mpt.profiler.recording import Recording, Window


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Two reports, with peaks of 4000 and 3000 bytes."""
    paths = []
    for name, peak in (("whole", 4000), ("half", 3000)):
        recording = Recording("cuda:0", 10, windows=[Window(0, 1, peak)])
        paths.append(str(tmp_path / f"{name}.json"))
        MemoryReport.from_recording(recording).save(paths[-1])
    return paths


def test_report_prints_a_table(files: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["report", files[0]]) == 0
    assert "3.91 KiB" in capsys.readouterr().out


def test_report_of_two_prints_the_saving(files: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["report", *files]) == 0
    printed = capsys.readouterr().out
    for said in ("whole", "half", "25.0%"):
        assert said in printed


def test_report_as_json(files: list[str], capsys: pytest.CaptureFixture) -> None:
    assert main(["report", "--json", *files]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["file"], row["peak_bytes"], row["saved_bytes"]) for row in rows] == [
        (files[0], 4000, 0),
        (files[1], 3000, 1000),
    ]


def test_files_of_one_name_are_told_apart_by_their_folders(tmp_path: Path, files: list[str], capsys) -> None:
    paths = []
    for folder, file in zip("ab", files, strict=True):
        (tmp_path / folder).mkdir()
        paths.append(Path(file).rename(tmp_path / folder / "memory_report.json"))
    assert main(["report", *map(str, paths)]) == 0
    printed = "".join(capsys.readouterr().out.split())
    assert "25.0%" in printed


@pytest.mark.parametrize("content", [None, "text"])
def test_a_file_that_is_no_report_is_an_error(content: str | None, tmp_path: Path, capsys) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path)]) == 2
    assert str(path) in capsys.readouterr().err


def test_a_command_is_needed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
    assert "report" in capsys.readouterr().err


def test_the_module_runs(files: list[str]) -> None:
    command = [sys.executable, "-m", "lightning_mpt.cli", "report", files[0]]
    assert "peak" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
