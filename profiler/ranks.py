"""Several processes, each with its own device: which of them is nearest to its limit."""

import torch.distributed

from .report import MemoryReport


def worst(report: MemoryReport | None) -> tuple[int, MemoryReport | None]:
    """The rank whose peak is highest, and its report, in every process; None where no process has one.

    A collective: every process of the default group must call it, with its own report or None.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, report
    peaks = [0] * torch.distributed.get_world_size()
    if len(peaks) == 1:
        return 0, report
    torch.distributed.all_gather_object(peaks, -1 if report is None else report.peak_bytes)
    rank = max(range(len(peaks)), key=peaks.__getitem__)
    shared = [report if torch.distributed.get_rank() == rank else None]
    torch.distributed.broadcast_object_list(shared, src=rank)
    return rank, shared[0]
