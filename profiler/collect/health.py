"""How well the CUDA caching allocator uses what it holds. Pure: works on what `torch.cuda.memory_stats` gives."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

from ..figures import AllocatorHealth
from ..recording import Event


def allocator_health(
    stats: Mapping[str, Any], device_memory: tuple[int, int], workspace_bytes: int, retries_before: int = 0
) -> AllocatorHealth:
    """The figures from what the allocator and the device say.

    Args:
        stats: `torch.cuda.memory_stats()`, since the peaks were reset.
        device_memory: `torch.cuda.mem_get_info()`: free and total, in bytes.
        workspace_bytes: of library workspaces that are alive.
        retries_before: what `num_alloc_retries` was when the recording began.
    """
    free, total = device_memory
    reserved = stats["reserved_bytes.all.peak"]
    return AllocatorHealth(
        reserved_bytes=reserved,
        # The two peaks need not come at one time, so this is the least that lay idle when most was held.
        fragmented_bytes=max(reserved - stats["allocated_bytes.all.peak"], 0),
        workspace_bytes=workspace_bytes,
        outside_bytes=max(total - free - stats["reserved_bytes.all.current"], 0),
        total_bytes=total,
        retries=stats.get("num_alloc_retries", 0) - retries_before,
    )


def workspaces_alive(blocks: Iterable[Event], sizes: Container[int], owned: Container[int]) -> int:
    """Bytes of the live blocks that have the size of a library's workspace and no owner at their address."""
    return sum(block.bytes for block in blocks if block.requested_bytes in sizes and block.address not in owned)
