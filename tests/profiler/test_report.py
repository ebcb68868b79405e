"""MemoryReport on recordings made by hand."""

import dataclasses
import json
from pathlib import Path

import pytest

from lightning_mpt.profiler import Category, MemoryReport
from lightning_mpt.profiler.recording import Claim, Event, Mark, Recording, Window


def training_step(device: str = "cuda:0", own_peak: int | None = 6000) -> Recording:
    """One step by hand: 1000 bytes of weights in a 1024 block, activations, a temporary, gradients, and an unknown."""
    return Recording(
        device=device,
        parameters=250,
        start=[Event(0, 1, 1024, 1000), Event(0, 9, 512, 512)],
        events=[
            Event(10, 2, 2048, 2048),  # activations of "layer"
            Event(20, 3, 512, 400),  # a temporary
            Event(25, 3, 0, 0),
            Event(110, 4, 1024, 1000),  # gradients
            Event(120, 2, 0, 0),
            Event(210, 5, 1024, 1000),  # optimizer state
        ],
        claims=[
            Claim(1, 1, 1000, Category.WEIGHTS, "layer", (250,), "float32"),
            Claim(15, 2, 2048, Category.ACTIVATIONS, "layer", (2, 256), "float32"),
            Claim(115, 4, 1000, Category.GRADIENTS, "layer", (250,), "float32"),
            Claim(290, 5, 1000, Category.OPTIMIZER_STATE, "layer", (250,), "float32"),
        ],
        phases=[Mark(2, "forward"), Mark(100, "backward"), Mark(200, "optimizer_step"), Mark(300, "")],
        modules=[Mark(5, "layer"), Mark(30, None)],
        windows=[Window(2, 300, own_peak)],
        reserved_bytes=1 << 21,
    )


def test_categories_sum_to_the_allocators_own_peak_and_the_difference_has_no_name() -> None:
    report = MemoryReport.from_recording(training_step())
    assert report.peak_bytes == 6000 == sum(report.categories.values())
    assert report.reserved_bytes == 1 << 21
    assert {category.value: size for category, size in report.categories.items() if size} == {
        "weights": 1000,
        "gradients": 1000,
        "activations": 2048,
        "rounding": 48,
        "unattributed": 512 + 6000 - 4608,
    }


def test_without_a_figure_of_the_allocators_own_the_replays_peak_counts() -> None:
    report = MemoryReport.from_recording(training_step("cpu", own_peak=None))
    assert report.peak_bytes == 1024 + 512 + 2048 + 1024
    assert sum(report.categories.values()) == report.peak_bytes


def test_phases_have_their_own_peaks() -> None:
    phases = MemoryReport.from_recording(training_step()).phases
    assert {name: phase.peak_bytes for name, phase in phases.items()} == {
        "forward": 1024 + 512 + 2048 + 512,
        "backward": 1024 + 512 + 2048 + 1024,
        "optimizer_step": 1024 + 512 + 1024 + 1024,
    }
    for phase in phases.values():
        assert sum(phase.categories.values()) == phase.peak_bytes
    assert phases["forward"].categories[Category.TEMPORARIES] == 400


def test_modules_sum_to_the_categories_and_tensors_come_largest_first() -> None:
    report = MemoryReport.from_recording(training_step())
    assert report.modules == {
        "layer": {Category.WEIGHTS: 1000, Category.ACTIVATIONS: 2048, Category.GRADIENTS: 1000},
    }
    assert [(t.bytes, t.category, t.shape) for t in report.tensors] == [
        (2048, Category.ACTIVATIONS, (2, 256)),
        (1000, Category.WEIGHTS, (250,)),
        (1000, Category.GRADIENTS, (250,)),
        (512, Category.UNATTRIBUTED, None),
    ]


def test_the_timeline_holds_the_peak() -> None:
    report = MemoryReport.from_recording(training_step())
    assert max(point.bytes for point in report.timeline) == 4608
    assert [point.time_ns for point in report.timeline] == sorted(point.time_ns for point in report.timeline)
    assert all(point.bytes == sum(point.categories.values()) for point in report.timeline)
    assert {point.phase for point in report.timeline} == {"forward", "backward", "optimizer_step"}


def test_a_report_is_frozen() -> None:
    report = MemoryReport.from_recording(training_step())
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.peak_bytes = 0


def test_save_and_load(tmp_path: Path) -> None:
    report = MemoryReport.from_recording(training_step())
    report.save(tmp_path / "report.json")
    assert MemoryReport.load(tmp_path / "report.json") == report
    content = json.loads((tmp_path / "report.json").read_text())
    assert (content["format"], content["version"]) == ("lightning-mpt-memory-report", 2)
    assert content["categories"]["activations"] == 2048


@pytest.mark.parametrize("failed_bytes", [None, 4096])
def test_a_report_from_before_it_said_that_memory_ran_out_is_read_by_the_size_that_it_has(
    failed_bytes: int | None, tmp_path: Path
) -> None:
    report = dataclasses.replace(MemoryReport.from_recording(training_step()), failed_request_bytes=failed_bytes)
    content = report.to_json()
    del content["out_of_memory"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert MemoryReport.load(tmp_path / "report.json").out_of_memory == (failed_bytes is not None)


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    recording = training_step()
    recording.workspace_bytes.append(512)
    recording.save(tmp_path / "trace.json")
    assert Recording.load(tmp_path / "trace.json") == recording
    assert MemoryReport.from_trace(tmp_path / "trace.json") == MemoryReport.from_recording(recording)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("not json", "is not JSON"),
        ("[]", "holds None, not 'lightning-mpt-memory-report'"),
        ('{"format": "something"}', "holds 'something', not 'lightning-mpt-memory-report'"),
        ('{"format": "lightning-mpt-memory-report", "version": 99}', "has version 99 .* reads version 2"),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        MemoryReport.load(path)


def test_compare_with_the_first_as_the_base() -> None:
    base, half = MemoryReport.from_recording(training_step()), MemoryReport.from_recording(training_step(own_peak=4608))
    comparison = base.compare(half)
    assert comparison.saved_bytes == (1392,)
    assert comparison.peak_ratios == (4608 / 6000,)


def test_a_recording_of_nothing_gives_a_report_of_nothing() -> None:
    report = MemoryReport.from_recording(Recording("cpu", 0))
    assert (report.peak_bytes, report.phases, report.tensors, report.steps) == (0, {}, (), 0)
