"""The command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from reports import transformer

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


def test_full_reports_show_more(files: list[str], capsys: pytest.CaptureFixture) -> None:
    transformer().save(files[0])
    assert main(["report", files[0]]) == 0
    assert "largest" not in capsys.readouterr().out
    assert main(["report", "--full", files[0]]) == 0
    assert "largest" in capsys.readouterr().out
    assert main(["report", "--full", *files]) == 0
    printed = capsys.readouterr().out
    assert printed.index("saved") < printed.index("whole\n") < printed.index("largest") < printed.index("half\n")


@pytest.mark.parametrize(
    ("option", "name", "beginning"),
    [("--html", "a.html", b"<!doctype html>"), ("--plot", "a.png", b"\x89PNG"), ("--perfetto", "a.json", b"{")],
)
def test_reports_are_drawn(option: str, name: str, beginning: bytes, files: list[str], tmp_path: Path, capsys) -> None:
    assert main(["report", *files, option, str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes().startswith(beginning)
    printed = capsys.readouterr()
    assert printed.err == f"wrote {tmp_path / name}\n"
    assert printed.out == ""


def test_drawing_and_json_go_together(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["report", "--json", "--html", str(tmp_path / "a.html"), *files]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that says why."""
    assert main(["report", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("lightning-mpt report: ")
    return line


def test_a_report_is_not_written_over(files: list[str], capsys: pytest.CaptureFixture) -> None:
    before = Path(files[1]).read_bytes()
    assert "is one of the reports" in refused([*files, "--perfetto", files[1]], capsys)
    assert Path(files[1]).read_bytes() == before


def test_a_plot_without_matplotlib_says_what_to_install(files: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert "lightning-mpt[plots]" in refused([files[0], "--plot", str(tmp_path / "a.png")], capsys)


def test_a_picture_of_an_unknown_kind_or_in_no_folder_is_refused(files: list[str], tmp_path: Path, capsys) -> None:
    assert "xyz" in refused([files[0], "--plot", str(tmp_path / "a.xyz")], capsys)
    assert "nowhere" in refused([files[0], "--html", str(tmp_path / "nowhere" / "a.html")], capsys)


@pytest.mark.parametrize("content", [None, b"", b"text", b"\x80\x04N.", b"\xff\xfe{", b'{"a": 1', b"[]", b"\n" * 100])
def test_a_file_that_is_no_report_is_an_error(content: bytes | None, tmp_path: Path, capsys) -> None:
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content)
    assert str(path) in refused([str(path)], capsys)
    assert str(path) in refused([str(path), "--json"], capsys)


def test_a_folder_and_a_damaged_report_are_errors(files: list[str], tmp_path: Path, capsys) -> None:
    assert str(tmp_path) in refused([str(tmp_path)], capsys)
    content = json.loads(Path(files[0]).read_text())
    Path(files[0]).write_text(json.dumps({**content, "categories": {"coffee": 1}}))
    assert "'coffee', not one of weights" in refused(files, capsys)


def test_a_command_is_needed(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([])
    assert exit_info.value.code == 2
    assert "report" in capsys.readouterr().err


def test_the_module_runs(files: list[str]) -> None:
    command = [sys.executable, "-m", "lightning_mpt.cli", "report", files[0]]
    assert "peak" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_optimizer_profiler_and_reports_do_without_lightning(files: list[str]) -> None:
    """It takes longer to import than all else together: who needs none of it need not wait for it."""
    code = (
        "import sys\n"
        "from lightning_mpt import MasterAdamW, PRESETS, DynamicLossScale\n"
        "from lightning_mpt.profiler import MemoryRecorder, MemoryReport\n"
        "from lightning_mpt.cli import main\n"
        "assert main(['report', *sys.argv[1:]]) == 0\n"
        "assert not {'lightning', 'matplotlib', 'transformers'} & set(sys.modules)\n"
        "from lightning_mpt import *\n"
        "assert 'lightning' in sys.modules and MasterWeightPrecision.__module__ == 'lightning_mpt.precision'"
    )
    subprocess.run([sys.executable, "-c", code, *files, "--full"], check=True, stdout=subprocess.DEVNULL)
