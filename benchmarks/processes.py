"""Commands in processes of their own, with a limit to their time, that leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

GRACE_S = 5.0
"""What is asked to end has so long before it is killed."""


class Guarded:
    """A command in `folder`, in a process of its own. It is started at once, and may wait for a line on its input.

    Args:
        command: the program and its arguments.
        folder: where it runs.
    """

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self._output = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        # A session of its own, so that it can be ended with its children.
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )

    def finish(self, limit_s: float) -> tuple[int | None, str]:
        """Close its input and wait: its exit status (None where it ran past `limit_s` and was ended) and its output.

        Whatever interrupts the wait, Ctrl-C above all, ends it as well, with all that it started.
        """
        status: int | None = None
        try:
            assert self._process.stdin is not None
            self._process.stdin.close()
            status = self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if status is None:
                self._stop()
        self._output.seek(0)
        return status, self._output.read()

    def end(self) -> None:
        """End it, where it runs still, and close what it read from and wrote to."""
        if self._process.poll() is None:
            self._stop()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._output.close()

    def _stop(self) -> None:
        """End the process and its group. It is asked first: it may have to end sessions that it began."""
        try:
            os.killpg(self._process.pid, signal.SIGINT)
            self._process.wait(GRACE_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def run_guarded(command: Sequence[str], limit_s: float, folder: Path) -> tuple[int | None, str]:
    """Run `command` in `folder`, as `Guarded` does."""
    guarded = Guarded(command, folder)
    try:
        return guarded.finish(limit_s)
    finally:
        guarded.end()


def failure(status: int | None, limit_s: float) -> str:
    """What an exit status says, in words."""
    return f"ran past {limit_s:.0f} s and was ended" if status is None else f"ended with status {status}"
