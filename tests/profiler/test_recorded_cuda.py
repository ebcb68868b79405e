"""A memory trace that a GPU has recorded: a step of a very small GPT under `mpt-16-true` on an H100.

`python -m benchmarks.cuda --only trace` records it anew.
"""

from pathlib import Path

import pytest

from lightning_mpt.profiler import Category, MemoryReport
from lightning_mpt.profiler.recording import Recording

TRACE = Path(__file__).resolve().parents[1] / "fixtures" / "cuda_trace.json"


@pytest.fixture(scope="module")
def recording() -> Recording:
    return Recording.load(TRACE)


@pytest.fixture(scope="module")
def report() -> MemoryReport:
    return MemoryReport.from_trace(TRACE)


def totals(recording: Recording) -> list[tuple[int, int]]:
    """What is allocated, and what was asked for, after every event of the recorded step: added up by hand."""
    live = {event.address: (event.bytes, event.requested_bytes) for event in recording.start}
    (window,) = recording.windows
    sums = []
    for event in recording.events:
        live.pop(event.address, None)
        if event.bytes > 0:
            live[event.address] = (event.bytes, event.requested_bytes)
        if window.start_ns <= event.time_ns <= window.end_ns:
            sums.append((sum(block for block, _ in live.values()), sum(asked for _, asked in live.values())))
    return sums


def test_it_replays_to_the_allocators_own_peak(recording: Recording, report: MemoryReport) -> None:
    (window,) = recording.windows
    assert window.peak_bytes is not None
    allocated, asked = max(totals(recording))
    assert allocated == window.peak_bytes == report.peak_bytes
    assert max(phase.peak_bytes for phase in report.phases.values()) == report.peak_bytes
    assert report.categories[Category.ROUNDING] == allocated - asked
    assert sum(report.categories.values()) == report.peak_bytes


def test_every_byte_has_its_name(report: MemoryReport) -> None:
    own = report.peak_bytes - 2 * 32 * 2**20 - 2**20  # cuBLAS's workspaces are most of so small a network's peak
    assert report.categories[Category.UNATTRIBUTED] <= 0.001 * own
    assert report.categories[Category.WEIGHTS] == 2 * report.parameters
    assert report.categories[Category.MASTER_WEIGHTS] == 2 * report.parameters
    assert 8 * report.parameters <= report.categories[Category.OPTIMIZER_STATE] <= 8.2 * report.parameters
    assert report.phases["optimizer_step"].categories[Category.GRADIENTS] == 2 * report.parameters


def test_both_blocks_have_equal_bytes(report: MemoryReport) -> None:
    of_blocks = [
        {path.removeprefix(f"gpt.blocks.{block}"): dict(own) for path, own in report.modules.items()
         if path.startswith(f"gpt.blocks.{block}")}
        for block in (0, 1)
    ]  # fmt: skip
    assert of_blocks[0]
    assert of_blocks[0] == of_blocks[1]


def test_what_the_device_held(report: MemoryReport) -> None:
    assert report.health is not None
    assert report.health.workspace_bytes == 65 * 2**20
    assert report.reserved_bytes is not None
    assert report.peak_bytes <= report.reserved_bytes <= report.health.total_bytes
