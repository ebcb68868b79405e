"""The CUDA history's parser on histories in the snapshot's own format, made by a model of the allocator."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_mpt.profiler.collect.cuda_trace import parse_segments, parse_trace, round_bytes, workspace_bytes
from lightning_mpt.profiler.recording import Event

MIB = 1 << 20
BASE = 0x7F0000000000


def segment(address: int, *blocks: tuple[int, str] | tuple[int, str, int], **more: Any) -> dict[str, Any]:
    """A segment of (size, state[, requested]) blocks, as `torch.cuda.memory._snapshot()` gives it."""
    at, listed = address, []
    for size, state, *requested in blocks:
        asked = requested[0] if requested else size
        listed.append({"address": at, "size": size, "requested_size": asked, "state": state, "frames": []})
        at += size
    return {
        "device": 0,
        "address": address,
        "total_size": at - address,
        "allocated_size": sum(b["size"] for b in listed if b["state"] == "active_allocated"),
        "stream": 0,
        "segment_type": "large" if at - address > 2 * MIB else "small",
        "is_expandable": False,
        "blocks": listed,
        **more,
    }


def entry(action: str, address: int, size: int, time_us: int = 1) -> dict[str, Any]:
    return {"action": action, "addr": address, "size": size, "stream": 0, "time_us": time_us, "frames": []}


def sizes(events: list[Event]) -> list[tuple[int, int, int]]:
    return [(event.address, event.bytes, event.requested_bytes) for event in events]


@pytest.mark.parametrize(("asked", "block"), [(1, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)])
def test_requests_are_rounded_to_512(asked: int, block: int) -> None:
    assert round_bytes(asked) == block


@pytest.mark.parametrize(
    ("asked", "divisions", "block"),
    [
        (1200, {"1": 4}, 1536),  # too small for quarters
        (3000, {"1": 4}, 3072),  # between 2048 and 4096 in quarters
        (4096, {"1": 4}, 4096),
        (5 * MIB, {"4": 2}, 6 * MIB),
        (5 * MIB, {"4": 0}, 5 * MIB),
        (5 * MIB, {"8": 2}, 5 * MIB),
    ],
)
def test_rounding_to_parts_of_powers_of_two(asked: int, divisions: dict[str, int], block: int) -> None:
    assert round_bytes(asked, divisions) == block


def test_blocks_that_are_allocated_when_the_recording_begins() -> None:
    held = segment(BASE, (512, "active_allocated", 100), (1024, "inactive"), (512, "active_awaiting_free"))
    assert sizes(parse_segments([held])) == [(BASE, 512, 100)]


def test_snapshots_without_block_addresses() -> None:
    held = segment(BASE, (1024, "inactive"), (512, "active_allocated", 100))
    for block in held["blocks"]:
        del block["address"]
    assert sizes(parse_segments([held])) == [(BASE + 1024, 512, 100)]


def test_a_small_block_is_cut_off_and_a_large_remainder_of_a_mebibyte_is_not() -> None:
    small = segment(BASE, (2 * MIB, "inactive"))
    large = segment(BASE + 100 * MIB, (20 * MIB, "inactive"))
    events = parse_trace(
        [
            entry("alloc", BASE, 100),
            entry("alloc", BASE + 512, 2000),
            entry("alloc", BASE + 100 * MIB, 18 * MIB),  # leaves 2 MiB: cut off
            entry("alloc", BASE + 118 * MIB, MIB + 512 * 1024),  # leaves 0.5 MiB: handed out whole
        ],
        [small, large],
    )
    assert sizes(events) == [
        (BASE, 512, 100),
        (BASE + 512, 2048, 2000),
        (BASE + 100 * MIB, 18 * MIB, 18 * MIB),
        (BASE + 118 * MIB, 2 * MIB, MIB + 512 * 1024),
    ]


def test_freed_neighbours_merge_within_a_segment_only() -> None:
    segments = [
        segment(BASE, (MIB, "active_allocated"), (MIB, "active_allocated")),
        segment(BASE + 2 * MIB, (2 * MIB, "active_allocated")),
    ]
    trace = []
    for offset, size in ((0, MIB), (MIB, MIB), (2 * MIB, 2 * MIB)):
        trace += [entry("free_requested", BASE + offset, size), entry("free_completed", BASE + offset, size)]
    trace += [entry("alloc", BASE, 2 * MIB - 600)]
    events = parse_trace(trace, segments)
    assert sizes(events)[-1] == (BASE, 2 * MIB, 2 * MIB - 600)


def test_a_block_counts_until_its_free_is_requested_and_is_handed_out_again_after_it_completed() -> None:
    held = segment(BASE, (MIB, "active_allocated"), (MIB, "inactive"))
    trace = [
        entry("free_requested", BASE, MIB, time_us=5),
        entry("alloc", BASE + MIB, 512, time_us=6),
        entry("free_completed", BASE, MIB, time_us=7),
        entry("alloc", BASE, 512, time_us=8),
    ]
    events = parse_trace(trace, [held])
    assert [(event.time_ns, event.address, event.bytes) for event in events] == [
        (5_000, BASE, 0),
        (6_000, BASE + MIB, 512),
        (8_000, BASE, 512),
    ]


def test_segments_come_and_go() -> None:
    trace = [
        entry("segment_alloc", BASE, 2 * MIB),
        entry("alloc", BASE, 100),
        entry("free_requested", BASE, 100),
        entry("free_completed", BASE, 100),
        entry("segment_free", BASE, 2 * MIB),
        entry("segment_alloc", BASE, 20 * MIB),
        entry("alloc", BASE, 19 * MIB + 1),
    ]
    assert sizes(parse_trace(trace, []))[-1] == (BASE, 20 * MIB, 19 * MIB + 1)


def test_expandable_segments_grow_and_are_always_cut() -> None:
    trace = [
        entry("segment_map", BASE, 20 * MIB),
        entry("alloc", BASE, 19 * MIB + 512 * 1024),  # leaves half a mebibyte, cut off all the same
        entry("segment_map", BASE + 20 * MIB, 20 * MIB),
        entry("alloc", BASE + 19 * MIB + 512 * 1024, 10 * MIB),
    ]
    assert sizes(parse_trace(trace, [])) == [
        (BASE, 19 * MIB + 512 * 1024, 19 * MIB + 512 * 1024),
        (BASE + 19 * MIB + 512 * 1024, 10 * MIB, 10 * MIB),
    ]


def test_blocks_of_the_largest_size_are_not_cut_where_a_limit_is_set() -> None:
    trace = [entry("segment_alloc", BASE, 40 * MIB), entry("alloc", BASE, 30 * MIB)]
    assert sizes(parse_trace(trace, []))[0][1] == 30 * MIB
    assert sizes(parse_trace(trace, [], {"max_split_size": 25 * MIB}))[0][1] == 40 * MIB


def test_what_the_history_tells_of_the_time_before_is_passed_over() -> None:
    held = segment(BASE, (512, "active_allocated", 10), (2 * MIB - 512, "inactive"))
    trace = [entry("alloc", BASE, 10, time_us=3), entry("snapshot", 0, 0, time_us=4), entry("oom", 0, 1, time_us=5)]
    trace.append(entry("alloc", BASE + 512, 20, time_us=9))
    assert sizes(parse_trace(trace, [held], since_ns=5_500)) == [(BASE + 512, 512, 20)]


def test_a_block_in_an_unknown_place_has_at_least_its_rounded_size() -> None:
    assert sizes(parse_trace([entry("alloc", BASE, 700)], [])) == [(BASE, 1024, 700)]


def test_sizes_of_cublas_workspaces() -> None:
    assert set(workspace_bytes({})) == {8_519_680, 32 * MIB, MIB}
    assert workspace_bytes({"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}) == [32 * MIB, MIB]
    assert workspace_bytes({"CUBLAS_WORKSPACE_CONFIG": ":16:8:4096:2"}) == [8_519_680, MIB]
    assert workspace_bytes({"CUBLAS_WORKSPACE_CONFIG": ":0:0", "CUBLASLT_WORKSPACE_SIZE": "1000"}) == [1_024_000]


class Allocator:
    """The caching allocator in little, written for this test: best fit in segments of 2 and 20 MiB and more."""

    def __init__(self) -> None:
        self.segments: list[list[list[int | None]]] = []  # of [address, size, requested (None: free)]
        self.trace: list[dict[str, Any]] = []
        self.allocated = 0
        self._next = BASE

    def _log(self, action: str, address: int, size: int) -> None:
        self.trace.append(entry(action, address, size, time_us=len(self.trace) + 1))

    def malloc(self, asked: int) -> int:
        size = round_bytes(asked)
        small = size <= MIB
        best = None
        for held in self.segments:
            if (sum(b[1] for b in held) == 2 * MIB) != small:
                continue
            for i, (_, free, requested) in enumerate(held):
                if requested is None and free >= size and (best is None or free < best[0][best[1]][1]):
                    best = (held, i)
        if best is None:
            total = 2 * MIB if small else max(20 * MIB, -(-size // (2 * MIB)) * 2 * MIB)
            self.segments.append([[self._next, total, None]])
            self._log("segment_alloc", self._next, total)
            self._next += total  # right behind it: segments that touch must not merge
            best = (self.segments[-1], 0)
        held, i = best
        address, free, _ = held[i]
        rest = free - size
        if rest >= 512 if small else rest > MIB:
            held[i] = [address, size, asked]
            held.insert(i + 1, [address + size, rest, None])
        else:
            held[i] = [address, free, asked]
        self.allocated += held[i][1]
        self._log("alloc", address, asked)
        return address

    def free(self, address: int) -> None:
        for held in self.segments:
            for i, block in enumerate(held):
                if block[0] == address:
                    self._log("free_requested", address, block[2])
                    self._log("free_completed", address, block[2])
                    self.allocated -= block[1]
                    block[2] = None
                    if i + 1 < len(held) and held[i + 1][2] is None:
                        block[1] += held.pop(i + 1)[1]
                    if i > 0 and held[i - 1][2] is None:
                        held[i - 1][1] += held.pop(i)[1]
                    return


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 3000), st.integers(MIB - 600, 25 * MIB), st.none()), max_size=60), st.data())
def test_blocks_sum_to_what_the_allocator_counts(requests: list[int | None], data: st.DataObject) -> None:
    """Blocks' sizes are in no history; following the cuts gives `allocated_bytes` back at every moment."""
    allocator = Allocator()
    live: list[int] = []
    counted: list[int] = []
    for asked in requests:
        if asked is None and live:
            allocator.free(live.pop(data.draw(st.integers(0, len(live) - 1))))
        elif asked is not None:
            live.append(allocator.malloc(asked))
        else:
            continue
        counted.append(allocator.allocated)
    now: dict[int, int] = {}
    replayed = []
    for event in parse_trace(allocator.trace, []):
        now.pop(event.address, None)
        if event.bytes:
            now[event.address] = event.bytes
        replayed.append(sum(now.values()))
    assert replayed == counted
