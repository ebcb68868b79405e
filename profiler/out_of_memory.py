"""What to say when memory runs out: what was live, what was asked for, and what would help.

Nothing here may get in the way of the exception itself: whatever fails while the table is made is a line on stderr.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .report import MemoryReport

if TYPE_CHECKING:
    from .collect.session import Session

_SAYS_SO = (
    "CUDA error: out of memory",
    "CUDA out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
    "DefaultCPUAllocator: not enough memory",
)
"""What RuntimeErrors say where memory ran out: CUDA, cuBLAS, cuDNN, torch's CPU allocator."""
_UNITS = {"bytes": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
_ASKED = re.compile(r"[Tt]ried to allocate ([0-9.]+) (bytes|KiB|MiB|GiB|TiB)")

_observed: list[int] = []
"""The size of the last request that CUDA's allocator failed to serve, once it is observed."""
_observing = False


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` says that an allocator, or a library that asks the device itself, got no memory."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAYS_SO)


def failed_request_bytes(error: BaseException) -> int | None:
    """How many bytes were asked for: as CUDA's allocator told, else as the message says, rounded; None if neither."""
    found = _ASKED.search(str(error))
    said = round(float(found[1]) * (1 << _UNITS[found[2]])) if found is not None else None
    if said is not None and _observed and abs(_observed[0] - said) <= 0.01 * said:
        return _observed[0]
    return said


def observe_failed_requests() -> None:
    """Have CUDA's allocator tell the exact size of a request that fails. An observer cannot be taken off: once only."""
    global _observing
    attach = getattr(torch._C, "_cuda_attach_out_of_memory_observer", None)
    if attach is None or _observing or not torch.cuda.is_initialized():
        return

    def observer(device: int, request_bytes: int, device_total: int, device_free: int) -> None:
        _observed[:] = [request_bytes]

    attach(observer)
    _observing = True


def explain(error: BaseException, session: "Callable[[], Session]") -> MemoryReport | None:
    """Print on stderr what was live when `error` came, and what would help. Never raises.

    Args:
        error: for which `is_out_of_memory` holds.
        session: gives the session that was recording, which is switched off, or else a new one.

    Returns:
        The report of that moment; None where it could not be made, which a line says.
    """
    report = None
    try:
        asked = session()
        recording = asked.fail() if asked.active else asked.what_is_live()
        request_bytes = asked.failed_request_bytes or failed_request_bytes(error)
        report = replace(MemoryReport.from_recording(recording), failed_request_bytes=request_bytes)
        _print(report)
    except Exception as trouble:  # the exception that matters is another one
        print(f"lightning-mpt: the memory table could not be shown: {trouble!r}", file=sys.stderr)
    return report


def _print(report: MemoryReport) -> None:
    from rich.console import Console

    from .show.render import print_report
    from .show.timeline import last_phase
    from .show.words import format_bytes, spoken

    console = Console(stderr=True, highlight=False, markup=False)
    phase = last_phase(report)
    where = f"{report.device}, in {spoken(phase)}" if phase else report.device
    failed_bytes = report.failed_request_bytes
    asked = f"{format_bytes(failed_bytes)} more" if failed_bytes is not None else "more"
    live = format_bytes(report.peak_bytes)
    console.print(f"Out of memory on {where}: {asked} was asked for, and this was live, {live}:", style="bold red")
    print_report(report, console)
