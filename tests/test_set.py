"""`python -m benchmarks`: pieces that fail or hang leave the others, and what came to its end is not run again."""

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

import benchmarks.__main__ as the_set
from benchmarks.__main__ import DONE, FAILED, GOAL_MISSED, NOT_RUN, PLAN, TIMED_OUT, Job, Journal, Outcome, run_all
from benchmarks.common import MISSED, ROOT, apart
from benchmarks.processes import run_guarded
from benchmarks.throughput import NETWORKS

WRITE = "import pathlib; pathlib.Path({path!r}).write_text('{{}}')"
HANG = "import time; time.sleep(60)"
COMMIT = "a" * 40


def job(name: str, code: str, limit_s: float = 20.0, *, always: bool = False) -> Job:
    return Job(name, ("-c", code), limit_s, always)


@pytest.fixture
def four(tmp_path: Path) -> list[Job]:
    """One that fails, one that hangs, one that misses its goal, and one that writes a result."""
    return [
        job("bad", "print('broke'); raise SystemExit(1)"),
        job("hangs", HANG, 1.0),
        job("missed", f"raise SystemExit({MISSED})"),
        job("good", WRITE.format(path=str(tmp_path / "good.json"))),
    ]


def run(todo: list[Job], folder: Path, *, commit: str = COMMIT, again: bool = False) -> tuple[list[Outcome], str]:
    console = Console(record=True, width=120, file=StringIO())
    outcomes = run_all(todo, Journal(folder / ".set.json", commit), folder, console, again=again)
    return outcomes, console.export_text()


def statuses(outcomes: list[Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def ran(outcomes: list[Outcome]) -> list[str]:
    """The names of those that were run now."""
    return [outcome.name for outcome in outcomes if not outcome.before]


@pytest.fixture(autouse=True)
def _heeds_ctrl_c() -> Iterator[None]:
    """Also where the tests run in the background of a shell, which lets what it starts there ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_piece_that_fails_or_hangs_leaves_the_others(four: list[Job], tmp_path: Path) -> None:
    outcomes, said = run(four, tmp_path)
    assert statuses(outcomes) == [FAILED, TIMED_OUT, GOAL_MISSED, DONE]
    assert [outcome.files for outcome in outcomes] == [(), (), (), ("good.json",)]
    assert 1.0 <= outcomes[1].seconds < 20.0
    assert "bad ended with status 1" in said
    assert "broke" in said
    assert "hangs ran past 1 s and was ended" in said


def test_what_came_to_its_end_is_not_run_again(four: list[Job], tmp_path: Path) -> None:
    first, _ = run(four, tmp_path)
    second, _ = run(four, tmp_path)
    assert statuses(second) == statuses(first)
    assert ran(second) == ["bad", "hangs"]
    assert second[3] == first[3]._replace(before=True)


@pytest.mark.parametrize("why", ["another commit", "changes", "again", "its result is gone", "always"])
def test_what_is_out_of_date_is_run_again(why: str, tmp_path: Path) -> None:
    good = job("good", WRITE.format(path=str(tmp_path / "good.json")), always=why == "always")
    commit = COMMIT + "+changes" if why == "changes" else COMMIT
    run([good], tmp_path, commit=commit)
    if why == "its result is gone":
        (tmp_path / "good.json").unlink()
    now = "b" * 40 if why == "another commit" else commit
    outcomes, _ = run([good], tmp_path, commit=now, again=why == "again")
    assert ran(outcomes) == ["good"]


def test_a_piece_that_fails_the_second_time_is_no_longer_done(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    once = job("once", f"import pathlib; pathlib.Path({str(marker)!r}).mkdir()")
    assert statuses(run([once], tmp_path)[0]) == [DONE]
    assert statuses(run([once], tmp_path, again=True)[0]) == [FAILED]
    assert ran(run([once], tmp_path)[0]) == ["once"]


def test_ctrl_c_ends_the_piece_and_keeps_what_is_done(tmp_path: Path) -> None:
    presses = f"import os, signal; os.kill({os.getpid()}, signal.SIGINT); {HANG}"
    todo = [job("good", "0"), job("hangs", presses), job("next", "1")]
    outcomes, _ = run(todo, tmp_path)
    assert [(outcome.name, outcome.status) for outcome in outcomes] == [
        ("good", DONE),
        ("hangs", NOT_RUN),
        ("next", NOT_RUN),
    ]
    todo[1] = job("hangs no more", "2")
    assert ran(run(todo, tmp_path)[0]) == ["hangs no more", "next"]


def test_what_is_ended_takes_along_what_it_started(tmp_path: Path) -> None:
    """Also where that leads a session of its own, as the pieces of the CUDA check do."""
    inner = "import pathlib, time\nwhile True: pathlib.Path('beat').touch(); time.sleep(0.05)"
    call = f"run_guarded([sys.executable, '-c', {inner!r}], 60, pathlib.Path.cwd())"
    outer = f"import pathlib, sys; sys.path.insert(0, {str(ROOT)!r}); from benchmarks.processes import *; {call}"
    status, output = run_guarded([sys.executable, "-c", outer], 3.0, tmp_path)
    assert status is None, output
    last = (tmp_path / "beat").stat().st_mtime_ns
    time.sleep(0.5)
    assert (tmp_path / "beat").stat().st_mtime_ns == last


@pytest.mark.parametrize(("codes", "status"), [(["pass", f"raise SystemExit({MISSED})"], 0), (["pass", "1/0"], 1)])
def test_the_exit_status_and_the_closing_table(
    codes: list[str],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(the_set, "jobs", lambda *_, **__: [job(f"piece {i}", code) for i, code in enumerate(codes)])
    monkeypatch.setattr(the_set, "RESULTS", tmp_path)
    assert the_set.main(["--accelerator", "cpu"]) == status
    lines = capsys.readouterr().out.splitlines()
    assert any("piece 0" in line and "done" in line for line in lines)
    assert any("piece 1" in line and ("failed" if status else "goal missed") in line for line in lines)
    assert the_set.main(["--accelerator", "cpu", "--only", "piece 0"]) == 0
    with pytest.raises(SystemExit):
        the_set.main(["--accelerator", "cpu", "--only", "piece 2"])
    assert "There are: piece 0, piece 1" in capsys.readouterr().err


def test_the_plan_for_a_gpu_is_in_pieces_of_under_eight_minutes() -> None:
    assert all(piece.minutes < 8 for piece in PLAN["cuda"])


def test_the_plan_for_a_gpu_has_every_network_of_throughput() -> None:
    commands = [shlex.split(piece.command) for piece in PLAN["cuda"]]
    assert [command[-1] for command in commands if command[0] == "throughput"] == list(NETWORKS["cuda"])


def test_no_benchmark_is_forgotten() -> None:
    """The suite needs a checkout, and the others are parts of benchmarks."""
    apart = {"__main__", "cuda_pieces", "lightning_suite"}
    planned = {piece.command.split()[0] for plan in PLAN.values() for piece in plan}
    files = (ROOT / "benchmarks").glob("*.py")
    assert {file.stem for file in files if 'if __name__ == "__main__"' in file.read_text()} - apart <= planned


@pytest.mark.parametrize("accelerator", PLAN)
def test_a_quick_set_says_so_to_every_piece(accelerator: str) -> None:
    assert all(one.command[-1] == "--quick" for one in the_set.jobs(accelerator, quick=True))
    assert all("--quick" not in one.command for one in the_set.jobs(accelerator, quick=False))


def test_what_a_child_answers_or_dies_of_reaches_who_asked() -> None:
    assert apart("profiler", "1000", limit_s=120)["events"] == 1000
    with pytest.raises(RuntimeError, match=r"(?s)profiler, many: ended with status 2:.*invalid int value: 'many'"):
        apart("profiler", "many", limit_s=120)
