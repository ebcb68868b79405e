"""Commands in processes of their own, with a limit to their time, that leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GRACE_S = 5.0
"""What is asked to end has so long before it is killed."""


def run_guarded(command: Sequence[str], limit_s: float, folder: Path) -> tuple[int | None, str]:
    """Run `command` in `folder`: its exit status (None where it ran past `limit_s` and was ended) and its output.

    Whatever interrupts the wait, Ctrl-C above all, ends it as well, with all that it started.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        # A session of its own, so that it can be ended with its children.
        process = subprocess.Popen(
            command,
            cwd=folder,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        status: int | None = None
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if status is None:
                _end(process)
        output.seek(0)
        return status, output.read()


def failure(status: int | None, limit_s: float) -> str:
    """What an exit status says, in words."""
    return f"ran past {limit_s:.0f} s and was ended" if status is None else f"ended with status {status}"


def _end(process: subprocess.Popen[Any]) -> None:
    """End the leader of a session and its group. It is asked first: it may have to end sessions that it started."""
    try:
        os.killpg(process.pid, signal.SIGINT)
        process.wait(GRACE_S)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
