"""The same network trained under several precisions, each in a process of its own, and what each needs.

A process of its own, since an allocator remembers: blocks that one run left behind, workspaces and compiled kernels
would be counted to the next. Parent and child share a folder: `job.json` says what to train, `progress` grows by a
byte a batch, and `report.json` and `outcome.json` say what came of it. The child ends itself when the parent is gone.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..codec import encode
from ..report import MemoryReport
from ..show.claims import FP32, saved_claims, share_claims
from .target import Target, TargetError

OK = "ok"
FAILED = "failed"
OUT_OF_MEMORY = "out of memory"
TIMED_OUT = "timed out"

JOB, PROGRESS, REPORT, OUTCOME, LOG = "job.json", "progress", "report.json", "outcome.json", "log.txt"
"""What is in the folder that parent and child share."""

_POLL_S = 0.1
_GRACE_S = 3.0


@dataclass(frozen=True)
class Job:
    """One run: what to train, under which precision, and for how many optimizer steps."""

    target: Target
    precision: str
    accelerator: str
    steps: int
    """Counted, after `warmup_steps`. Up to as many more follow that are only timed, where the data has them."""
    warmup_steps: int = 2
    seed: int = 0

    @property
    def batches(self) -> int:
        """Batches in all, where each is a step."""
        return self.warmup_steps + 2 * self.steps


@dataclass(frozen=True)
class Row:
    """What came of one precision.

    Attributes:
        precision: its name.
        status: OK, FAILED, OUT_OF_MEMORY or TIMED_OUT.
        report: where the memory went; None unless the status is OK.
        step_seconds: the median time of the steps after the recorded ones; None where there were none.
        error: one line that says why, unless the status is OK.
    """

    precision: str
    status: str
    report: MemoryReport | None = None
    step_seconds: float | None = None
    error: str | None = None


def base_of(rows: Sequence[Row]) -> Row | None:
    """The row that the others are measured against: the first that worked."""
    return next((row for row in rows if row.report is not None), None)


def to_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as dictionaries. Where `32-true` is among them, `claims` holds what is usually said against them."""
    base = base_of(rows)
    fp32 = next((row.report for row in rows if row.precision == FP32), None)
    content = []
    for row in rows:
        report = row.report
        row_content: dict[str, Any] = {
            "precision": row.precision,
            "status": row.status,
            "error": row.error,
            "peak_bytes": None if report is None else report.peak_bytes,
            "saved_bytes": None,
            "categories": {},
            "reserved_bytes": None if report is None else report.reserved_bytes,
            "step_seconds": row.step_seconds,
            "claims": [],
            "notes": [],
        }
        if report is not None:
            assert base is not None
            assert base.report is not None
            row_content["saved_bytes"] = base.report.peak_bytes - report.peak_bytes
            row_content["categories"] = {category.value: size for category, size in report.categories.items()}
            row_content["notes"] = list(report.notes)
            if fp32 is not None:
                claims = share_claims(fp32) if report is fp32 else saved_claims(fp32, report)
                row_content["claims"] = [{**asdict(claim), "holds": claim.holds} for claim in claims]
        content.append(row_content)
    return content


def run_job(
    job: Job,
    command: Sequence[str],
    *,
    timeout_s: float = 600.0,
    save_to: Path | None = None,
    watch: Callable[[int], None] = lambda batches: None,
) -> Row:
    """Run one job in a fresh process and wait for it. However this is left, the process and its children are gone.

    Args:
        job: what to run.
        command: starts a process that calls `compare_child.main` on the folder given as its last argument.
        timeout_s: after how many seconds the process is ended.
        save_to: a folder in which to keep the report, as `PRECISION.json`, or else what the process printed.
        watch: is called several times a second with the number of batches done.

    Raises:
        TargetError: what is to be trained cannot be, whatever the precision.
    """
    with tempfile.TemporaryDirectory(prefix="lightning-mpt-") as scratch:
        folder = Path(scratch)
        (folder / JOB).write_text(json.dumps(encode(job)), encoding="utf-8")
        returncode = _run(command, folder, timeout_s, watch)
        row = _row(job, folder, returncode, timeout_s)
        if save_to is not None:
            save_to.mkdir(parents=True, exist_ok=True)
            kept, name = (REPORT, ".json") if row.status == OK else (LOG, ".log")
            shutil.copyfile(folder / kept, save_to / (job.precision.replace(":", "-") + name))
        return row


def _run(command: Sequence[str], folder: Path, timeout_s: float, watch: Callable[[int], None]) -> int | None:
    """The exit code; None where the time was up."""
    (folder / PROGRESS).touch()
    with (folder / LOG).open("wb") as log:
        process = subprocess.Popen(
            [*command, str(folder)],
            stdin=subprocess.PIPE,  # never written to: its end tells the child that this process is gone
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONFAULTHANDLER": "1"},
            start_new_session=True,  # a group of its own: DataLoader workers end with it
        )
        deadline = time.monotonic() + timeout_s
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    return None
                watch((folder / PROGRESS).stat().st_size)
                try:
                    process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    continue
            return process.returncode
        finally:
            _end(process)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all of its group: by request, then by force. Does nothing where it has ended itself."""
    if process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        _signal_group(process, getattr(signal, "SIGKILL", signal.SIGTERM))
        process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _signal_group(process: "subprocess.Popen[bytes]", number: int) -> None:
    if not hasattr(os, "killpg"):
        process.kill()
        return
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def _row(job: Job, folder: Path, returncode: int | None, timeout_s: float) -> Row:
    if returncode is None:
        return Row(job.precision, TIMED_OUT, error=f"not done after {timeout_s:g} s")
    if not (folder / OUTCOME).exists():
        return Row(job.precision, FAILED, error=_how_it_ended(returncode, folder))
    outcome = json.loads((folder / OUTCOME).read_text(encoding="utf-8"))
    if outcome["bad_target"]:
        raise TargetError(outcome["error"])
    if outcome["status"] != OK:
        return Row(job.precision, outcome["status"], error=outcome["error"])
    return Row(job.precision, OK, MemoryReport.load(folder / REPORT), outcome["step_seconds"])


def _how_it_ended(returncode: int, folder: Path) -> str:
    """Of a process that left no word."""
    if returncode < 0:
        name = signal.Signals(-returncode).name
        hint = ", as Linux does when the machine's memory runs out" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}"
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = f": {lines[-1].strip()}" if lines else ""
    return f"the process ended with exit code {returncode}{said}"
