"""The CUDA caching allocator's history to events. Pure: works on the dictionaries of `torch.cuda.memory._snapshot()`.

The history gives the *requested* size of every allocation, while `allocated_bytes` counts blocks, and a freed block's
size is in no snapshot. So the blocks are followed as the allocator cuts them (c10/cuda/CUDACachingAllocator.cpp:
`round_size`, `should_split`, `free_block`): requests are rounded up to 512 bytes; a free block that is larger is split,
unless it is in the large pool and would leave 1 MiB or less, when all of it is handed out; freed neighbours merge.

Two kinds of free: `free_requested`, when the tensor dies, after which `allocated_bytes` no longer counts the block; and
`free_completed`, when other streams are done with it and it can be handed out again.
"""

import re
from collections.abc import Mapping
from typing import Any

from ..recording import Event

MIN_BLOCK_BYTES = 512
SMALL_BYTES = 1 << 20
"""Requests up to this size come from the pool of small segments; a remainder up to it is not split off large blocks."""


def parse_segments(segments: list[dict[str, Any]]) -> list[Event]:
    """The blocks that the segments of a snapshot hold allocated."""
    return [
        Event(0, block["address"], block["size"], block["requested_size"])
        for segment in segments
        for block in _blocks(segment)
        if block["state"] == "active_allocated"
    ]


def parse_trace(
    trace: list[dict[str, Any]],
    segments: list[dict[str, Any]],
    settings: dict[str, Any] | None = None,
    since_ns: int = 0,
) -> list[Event]:
    """The allocations and frees in one device's trace, with the size of the block that each request was given.

    Args:
        trace: `snapshot["device_traces"][device]`, in the order in which things happened.
        segments: the device's segments when the recording began.
        settings: `snapshot["allocator_settings"]`, of which `max_split_size` and `roundup_power2_divisions` count.
        since_ns: when `segments` was taken; what the trace tells of the time before is passed over.
    """
    layout = _Layout(segments, settings or {})
    events = []
    for entry in trace:
        time_ns = entry["time_us"] * 1000
        if time_ns + 1000 <= since_ns:
            continue
        action, size, address = entry["action"], entry["size"], entry.get("addr", 0)
        if action == "alloc":
            events.append(Event(time_ns, address, layout.allocate(address, size), size))
        elif action == "free_requested":
            events.append(Event(time_ns, address, 0, 0))
        elif action == "free_completed":
            layout.free(address)
        elif action in ("segment_alloc", "segment_map"):
            layout.add_segment(address, size, expandable=action == "segment_map")
        elif action in ("segment_free", "segment_unmap"):
            layout.remove_segment(address, size)
    return events


def last_failure(trace: list[dict[str, Any]], since_ns: int = 0) -> tuple[int, int] | None:
    """When (ns) a request last failed in one device's trace, and how many bytes it asked for; None where none did."""
    for entry in reversed(trace):
        if entry["action"] == "oom" and entry["time_us"] * 1000 + 1000 > since_ns:
            return entry["time_us"] * 1000, entry["size"]
    return None


def round_bytes(size: int, divisions: dict[str, int] | None = None) -> int:
    """The block that the allocator looks for when asked for `size` bytes.

    Args:
        size: bytes asked for.
        divisions: the allocator's setting `roundup_power2_divisions`: by the power of two of MiB that a request reaches
            (as text; smaller requests go by "1"), into how many steps the way to the next power of two is cut.
    """
    if divisions:
        power = size.bit_length() - 1
        parts = divisions.get(str(1 << max(power - 20, 0)), 0)
        if parts > 1 and size > MIN_BLOCK_BYTES * parts and size != 1 << power:
            step = (1 << power) >> (parts.bit_length() - 1)
            return -(-size // step) * step
    return max(MIN_BLOCK_BYTES, -(-size // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES)


def workspace_bytes(environment: Mapping[str, str]) -> list[int]:
    """The sizes that the workspaces of cuBLAS and cuBLASLt may have: torch allocates them once and never frees them.

    By default (aten/src/ATen/cuda/CublasHandlePool.cpp) 4096 KiB x 8 on Hopper and Blackwell, 4096 KiB x 2 + 16 KiB x 8
    elsewhere, and 1024 KiB of cuBLASLt; else what `CUBLAS_WORKSPACE_CONFIG` (":KIB:COUNT", repeated) and
    `CUBLASLT_WORKSPACE_SIZE` (KiB) say.
    """
    sizes = [4096 * 8 * 1024, (4096 * 2 + 16 * 8) * 1024]
    config = environment.get("CUBLAS_WORKSPACE_CONFIG")
    if config:
        sizes = [sum(int(size) * int(count) * 1024 for size, count in re.findall(r":(\d+):(\d+)", config))]
    lt = environment.get("CUBLASLT_WORKSPACE_SIZE", "")
    sizes.append((int(lt) if lt.isdigit() else 1024) * 1024)
    return [size for size in sizes if size > 0]


def _blocks(segment: dict[str, Any]) -> list[dict[str, Any]]:
    """A segment's blocks, each with its address (which older snapshots leave out)."""
    address = segment["address"]
    blocks = []
    for block in segment["blocks"]:
        blocks.append({"address": address, "requested_size": block["size"], **block})
        address += block["size"]
    return blocks


class _Layout:
    """Which stretches of the segments are free, and how large each taken block is."""

    def __init__(self, segments: list[dict[str, Any]], settings: dict[str, Any]) -> None:
        self._free: dict[int, int] = {}  # address -> bytes, of free stretches
        self._free_ends: dict[int, int] = {}  # end -> address
        self._taken: dict[int, int] = {}
        self._edges: set[int] = set()  # where segments meet: blocks of two segments never merge
        self._divisions = settings.get("roundup_power2_divisions") or {}
        self._expandable = bool(settings.get("expandable_segments", False))
        limit = settings.get("max_split_size", -1)
        self._max_split = limit if limit > 0 else 1 << 62
        for segment in segments:
            if segment.get("is_expandable", False):
                self._expandable = True
            else:
                self._edges |= {segment["address"], segment["address"] + segment["total_size"]}
            for block in _blocks(segment):
                if block["state"] == "inactive":
                    self._add_free(block["address"], block["size"])
                else:
                    self._taken[block["address"]] = block["size"]

    def allocate(self, address: int, requested: int) -> int:
        """The size of the block that a request was given at `address`."""
        rounded = round_bytes(requested, self._divisions)
        found = self._free.get(address, 0)
        if found < rounded:  # not where it should be, as far as is known: the least that it can be
            self._taken[address] = rounded
            return rounded
        self._drop_free(address)
        remaining = found - rounded
        if rounded <= SMALL_BYTES or self._expandable:
            split = remaining >= MIN_BLOCK_BYTES
        else:
            split = rounded < self._max_split and remaining > SMALL_BYTES
        size = rounded if split else found
        if size < found:
            self._add_free(address + size, remaining)
        self._taken[address] = size
        return size

    def free(self, address: int) -> None:
        size = self._taken.pop(address, None)
        if size is not None:
            self._add_free(address, size)

    def add_segment(self, address: int, size: int, expandable: bool) -> None:
        if expandable:
            self._expandable = True
        else:
            self._edges |= {address, address + size}
        self._add_free(address, size)

    def remove_segment(self, address: int, size: int) -> None:
        """Take [address, address + size) out of the free stretch that holds it."""
        for start, length in list(self._free.items()):
            if start <= address and address + size <= start + length:
                self._drop_free(start)
                if start < address:
                    self._add_free(start, address - start)
                if address + size < start + length:
                    self._add_free(address + size, start + length - address - size)
                return

    def _add_free(self, address: int, size: int) -> None:
        before = self._free_ends.get(address)
        if before is not None and address not in self._edges:
            size += self._free[before]
            self._drop_free(before)
            address = before
        after = self._free.get(address + size)
        if after is not None and address + size not in self._edges:
            self._drop_free(address + size)
            size += after
        self._free[address] = size
        self._free_ends[address + size] = address

    def _drop_free(self, address: int) -> None:
        size = self._free.pop(address)
        self._free_ends.pop(address + size, None)
