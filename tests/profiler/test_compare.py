"""`compare`: what one run does in its process, and how processes are started and ended."""

import contextlib
import inspect
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mpt.precisions import trainer_arguments
from lightning_mpt.profiler import Category, MemoryReport
from lightning_mpt.profiler.codec import encode
from lightning_mpt.profiler.compare import child
from lightning_mpt.profiler.compare.run import (
    FAILED,
    JOB,
    OK,
    OUT_OF_MEMORY,
    OUTCOME,
    REPORT,
    TIMED_OUT,
    Job,
    Row,
    run_job,
)
from lightning_mpt.profiler.compare.target import Target, TargetError

HERE = str(Path(__file__).parent / "trained.py")


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A run seeds everything and adds to the import path, in a process of its own; here that is undone."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(sys, "path", list(sys.path))
    with torch.random.fork_rng():
        yield


# -- in the process of one run ----------------------------------------------------------------------------------------


def job_for(name: str, precision: str = "32-true", *, steps: int = 2, **target: Any) -> Job:
    return Job(Target(f"{HERE}:{name}", **target), precision, "cpu", steps)


def trained(job: Job, folder: Path) -> tuple[MemoryReport, float | None, int]:
    """The report, the seconds of a step, and the number of batches that the parent is told of."""
    progress = io.BytesIO()
    report, seconds = child.train(job, trainer_arguments, folder, progress)  # type: ignore[arg-type]
    return report, seconds, len(progress.getvalue())


@pytest.mark.parametrize("name", ["WithData", "Manual", "Plateau"])
@pytest.mark.parametrize("precision", ["32-true", "mpt-bf16-true"])
def test_modules_of_every_kind_are_trained(name: str, precision: str, tmp_path: Path) -> None:
    report, seconds, batches = trained(job_for(name, precision), tmp_path)
    assert report.steps == 2
    assert batches == 6
    assert seconds is not None
    assert sum(report.categories.values()) == report.peak_bytes
    parameters = report.parameters
    expected = {"32-true": (4, 0), "mpt-bf16-true": (2, 2)}[precision]
    assert (report.categories[Category.WEIGHTS], report.categories[Category.MASTER_WEIGHTS]) == tuple(
        size * parameters for size in expected
    )
    assert report.notes == ()


@pytest.mark.parametrize(
    "target",
    [
        Target(
            "examples.train_gpt:GPTModule",
            {"size": "nano", "seq_len": "16"},
            "examples.train_gpt:ByteText",
            {"seq_len": "16", "batch_size": "2"},
        ),
        Target("examples.train_digits:DigitsModule", {"width": "4"}, "examples.train_digits:Digits"),
    ],
    ids=["gpt", "digits"],
)
def test_the_examples_are_trained(target: Target, tmp_path: Path) -> None:
    report, _, _ = trained(Job(target, "mpt-bf16-true", "cpu", 1), tmp_path)
    assert report.categories[Category.MASTER_WEIGHTS] > 0
    assert report.categories[Category.OPTIMIZER_STATE] >= 8 * report.parameters


def test_model_and_data_may_differ_in_an_argument_of_one_name(tmp_path: Path) -> None:
    sizes = {"seq_len": "16", "batch_size": "2", "steps": "9"}
    target = Target("examples.train_gpt:GPTModule", {"size": "nano"}, "examples.train_gpt:ByteText", sizes)
    assert trained(Job(target, "32-true", "cpu", 1), tmp_path)[0].steps == 1


def test_gradient_release_is_a_precision_too(tmp_path: Path) -> None:
    report, _, _ = trained(job_for("WithData", "mpt-bf16-true:minimal"), tmp_path)
    assert report.phases["optimizer_step"].categories.get(Category.GRADIENTS, 0) == 0


def test_the_same_seed_gives_the_same_network_and_data(tmp_path: Path) -> None:
    first, again = (trained(job_for("WithData"), tmp_path)[0] for _ in range(2))
    assert first.categories == again.categories
    assert first.peak_bytes == again.peak_bytes


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model: {}\ntrainer:\n  accumulate_grad_batches: 2\n  precision: 16-mixed\n  max_steps: 1\n")
    job = Job(Target(f"{HERE}:WithData", config=str(config)), "32-true", "cpu", 1)
    report, seconds, batches = trained(job, tmp_path)
    assert (report.steps, batches) == (1, 8)
    assert seconds is not None
    assert report.categories[Category.OPTIMIZER_STATE] > 0


def test_steps_that_are_only_timed_need_not_be_there(tmp_path: Path) -> None:
    job = job_for("Tiny", data=f"{HERE}:Samples", data_arguments={"count": "16", "batch_size": "4"})
    report, seconds, batches = trained(job, tmp_path)
    assert (report.steps, seconds, batches) == (2, None, 4)


def test_slow_steps_are_timed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_TIMING_S", 0.0)
    report, seconds, batches = trained(job_for("WithData", steps=3), tmp_path)
    assert (report.steps, batches) == (3, 6)
    assert seconds is not None


@pytest.mark.filterwarnings("ignore:Total length of:UserWarning", "ignore:There is no memory report:UserWarning")
@pytest.mark.parametrize(("count", "batches"), [(0, "0 batches"), (4, "1 batch"), (12, "3 batches")])
@pytest.mark.parametrize("name", ["Tiny", "Plateau"])
def test_too_few_batches_are_an_error_that_counts_them(name: str, count: int, batches: str, tmp_path: Path) -> None:
    job = job_for(name, data=f"{HERE}:Samples", data_arguments={"count": str(count), "batch_size": "4"})
    with pytest.raises(TargetError, match=rf"gives {batches} an epoch and 4 are needed, for 2 steps .* and 2 to count"):
        trained(job, tmp_path)


@pytest.mark.filterwarnings("ignore:.*returned .None.*:UserWarning")
def test_a_network_that_never_steps_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing ran backward in 6 batches"):
        trained(job_for("NeverSteps"), tmp_path)


def outcome_of(job: Job, folder: Path) -> dict[str, Any]:
    (folder / JOB).write_text(json.dumps(encode(job)))
    child.run(folder, trainer_arguments)
    return json.loads((folder / OUTCOME).read_text())


def test_a_run_leaves_its_report_and_says_that_it_worked(tmp_path: Path) -> None:
    outcome = outcome_of(job_for("WithData"), tmp_path)
    assert (outcome["status"], outcome["error"]) == (OK, None)
    assert MemoryReport.load(tmp_path / REPORT).steps == 2


@pytest.mark.parametrize(
    ("job", "status", "error", "bad_target"),
    [
        (job_for("Fails"), FAILED, "RuntimeError: shapes do not fit", False),
        (
            job_for("OutOfMemoryAtBF16", "bf16-true"),
            OUT_OF_MEMORY,
            "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.",
            False,
        ),
        (job_for("Tiny"), FAILED, f"'{HERE}:Tiny' has no train_dataloader", True),
        (job_for("WithData", "bf16"), FAILED, "ValueError: precision 'bf16' is not one of", False),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_run_that_fails_says_how(job: Job, status: str, error: str, bad_target: bool, tmp_path: Path, capsys) -> None:
    outcome = outcome_of(job, tmp_path)
    assert (outcome["status"], outcome["bad_target"]) == (status, bad_target)
    assert outcome["error"].startswith(error)
    assert "\n" not in outcome["error"]
    assert "Traceback" in capsys.readouterr().err  # in the log that is kept


@pytest.mark.parametrize(
    ("error", "ran_out"),
    [
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_memory_that_ran_out_is_known_by_its_messages(error: Exception, ran_out: bool) -> None:
    assert child.ran_out_of_memory(error) == ran_out
    outer = TargetError("the model raised")
    outer.__cause__ = error
    assert child.ran_out_of_memory(outer) == ran_out


# -- processes --------------------------------------------------------------------------------------------------------

PYTHON = [sys.executable, "-S", "-c"]
"""A process that imports nothing. The folder of the job is its first argument."""


def alive(pid: int) -> bool:
    """Whether the process is there and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def test_a_process_that_leaves_no_word_is_a_failure() -> None:
    job = job_for("Tiny")
    row = run_job(job, [*PYTHON, "print('one'); print('the last words'); raise SystemExit(3)"])
    assert (row.status, row.error) == (FAILED, "the process ended with exit code 3: the last words")
    row = run_job(job, [*PYTHON, "import os; os.kill(os.getpid(), 9)"])
    assert row.status == FAILED
    assert row.error == "the process was ended by SIGKILL, as Linux does when the machine's memory runs out"


def test_the_parent_sees_the_batches_and_keeps_the_log(tmp_path: Path) -> None:
    script = "import sys, time; open(sys.argv[1] + '/progress', 'ab').write(b'...'); time.sleep(0.5); print('words')"
    seen: list[int] = []
    run_job(job_for("Tiny", "mpt-16-true:compact"), [*PYTHON, script], watch=seen.append, save_to=tmp_path / "kept")
    assert seen[-1] == 3
    assert (tmp_path / "kept" / "mpt-16-true-compact.log").read_text() == "words\n"


GROUP = (
    "import subprocess, sys, time\n"
    "worker = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(100)'])\n"
    "open(sys.argv[1], 'w').write(str(worker.pid))\n"
    "time.sleep(100)\n"
)
"""A process with a worker, whose id it writes to a file."""


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc, which only Linux has")
def test_when_the_time_is_up_the_process_and_its_workers_end(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    row = run_job(job_for("Tiny"), [*PYTHON, GROUP, str(pid)], timeout_s=2)
    assert (row.status, row.error) == (TIMED_OUT, "not done after 2 s")
    assert wait_for(lambda: not alive(int(pid.read_text())))


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks at processes in /proc, which only Linux has")
def test_an_interruption_ends_the_process_and_its_workers(tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def interrupt(batches: int) -> None:
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(job_for("Tiny"), [*PYTHON, GROUP, str(pid)], watch=interrupt)
    assert wait_for(lambda: not alive(int(pid.read_text())))


def test_a_run_ends_when_its_parent_is_gone() -> None:
    source = inspect.getsource(child._end_with_parent)
    script = (
        f"import os, signal, sys, threading, time\n{source}\n_end_with_parent()\nprint(1, flush=True)\ntime.sleep(100)"
    )
    run = subprocess.Popen([*PYTHON, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
    assert run.stdin is not None
    assert run.stdout is not None
    with run.stdout, contextlib.closing(run.stdin):
        assert run.stdout.readline() == b"1\n"
        assert run.poll() is None
        run.stdin.close()  # as the system does when this process ends, however it ends
        assert run.wait(20) != 0


def with_outcome(**outcome: Any) -> list[str]:
    """What starts a process that leaves this outcome and does nothing else."""
    text = json.dumps({"error": None, "bad_target": False, "step_seconds": None, **outcome})
    return [*PYTHON, f"import sys; open(sys.argv[1] + '/outcome.json', 'w').write({text!r})"]


def test_memory_that_ran_out_is_a_row() -> None:
    row = run_job(job_for("Tiny"), with_outcome(status=OUT_OF_MEMORY, error="OutOfMemoryError: CUDA out of memory."))
    assert row == Row("32-true", OUT_OF_MEMORY, error="OutOfMemoryError: CUDA out of memory.")


def test_a_target_that_cannot_be_is_raised() -> None:
    with pytest.raises(TargetError, match="no such class"):
        run_job(job_for("Tiny"), with_outcome(status=FAILED, bad_target=True, error="no such class"))


@pytest.mark.parametrize(("how", "said"), [("input()", "EOFError"), ("raise SystemExit(0)", "SystemExit")])
def test_a_network_that_asks_or_ends_the_process_fails_at_once(tmp_path: Path, how: str, said: str) -> None:
    file = tmp_path / "asks.py"
    file.write_text(
        "import runpy\n"
        f"WithData = runpy.run_path({HERE!r})['WithData']\n"
        "class Asks(WithData):\n"
        "    def training_step(self, batch, batch_idx):\n"
        f"        {how}\n"
    )
    row = run_job(
        Job(Target(f"{file}:Asks"), "32-true", "cpu", 1),
        [sys.executable, "-m", "lightning_mpt.cli.compare_child"],
        timeout_s=120,
    )
    assert row.status == FAILED
    assert said in str(row.error)
