"""What the tables say, and that they fit."""

import io

import pytest
from rich.console import Console

from lightning_mpt.profiler import MemoryReport
from lightning_mpt.profiler.recording import Recording
from lightning_mpt.profiler.render import format_bytes, print_comparison, print_report, report_text

from .test_report import training_step


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536 << 20, "1.50 GiB"),
        (5 << 50, "5120.00 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


def shown(width: int, *, compare: bool = False) -> list[str]:
    report = MemoryReport.from_recording(training_step())
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None)
    if compare:
        names = ["32-true", "a-precision-with-a-rather-long-name"]
        smaller = MemoryReport.from_recording(training_step(own_peak=4608))
        print_comparison(report.compare(smaller, names=names), console)
    else:
        print_report(report, console)
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_fits_and_says_what_matters(width: int) -> None:
    lines = shown(width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for said in ("weights", "4.00", "activations", "2.00 KiB", "34.1%", "5.86 KiB", "100.0%", "phase peaks"):
        assert said in text
    assert "on cuda:0, 1 step" in text
    assert "reserved" in text


@pytest.mark.parametrize("width", [60, 200])
def test_reports_side_by_side(width: int) -> None:
    lines = shown(width, compare=True)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "32-true" in text
    assert "23.2%" in text  # 1392 of 6000 bytes saved


def test_an_empty_report_can_be_shown() -> None:
    assert "peak" in report_text(MemoryReport.from_recording(Recording("cpu", 0)))
