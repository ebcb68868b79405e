"""The timeline as phases, as trace events and as a picture."""

import json
import sys
from pathlib import Path

import pytest
from reports import transformer

from lightning_mpt.profiler import Category, MemoryReport, TimelinePoint
from lightning_mpt.profiler.recording import Recording
from lightning_mpt.profiler.show.perfetto import trace_events, write_perfetto
from lightning_mpt.profiler.show.plot import write_plot
from lightning_mpt.profiler.show.timeline import COLORS, STACKED, Span, phase_spans, used_categories

PNG = b"\x89PNG\r\n\x1a\n"


def report_of(*points: tuple[int, str, int]) -> MemoryReport:
    """Points of (time in ns, phase, bytes of activations)."""
    timeline = tuple(TimelinePoint(at, phase, size, {Category.ACTIVATIONS: size}) for at, phase, size in points)
    return transformer(timeline=timeline)


POINTS = report_of((1000, "forward", 10), (2000, "forward", 30), (5000, "backward", 20), (9000, "forward", 5))


def test_phases_are_spans_that_touch() -> None:
    assert phase_spans(POINTS) == [
        Span("forward", 1000, 5000, 30),
        Span("backward", 5000, 9000, 20),
        Span("forward", 9000, 9000, 5),
    ]
    assert phase_spans(report_of()) == []


def test_every_category_has_a_place_and_a_color() -> None:
    assert set(STACKED) == set(COLORS) == set(Category)
    assert len(STACKED) == len(set(COLORS.values())) == len(Category)


def test_only_categories_with_bytes_are_drawn() -> None:
    assert used_categories(report_of((0, "forward", 1)))[-2:] == [Category.ACTIVATIONS, Category.TEMPORARIES]
    assert used_categories() == []


def test_trace_events_have_counters_and_slices_in_microseconds() -> None:
    events = trace_events(POINTS, "mine", process=7)
    assert {event["pid"] for event in events} == {7}
    assert {event["ph"] for event in events} == {"M", "C", "X"}
    slices = [(e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]
    assert slices == [("forward", 1.0, 4.0), ("backward", 5.0, 4.0), ("forward", 9.0, 0.0)]
    allocated = [(e["ts"], e["args"]) for e in events if e["ph"] == "C" and e["name"] == "allocated"]
    assert allocated == [(1.0, {"bytes": 10}), (2.0, {"bytes": 30}), (5.0, {"bytes": 20}), (9.0, {"bytes": 5})]
    tracks = {e["name"] for e in events if e["ph"] == "C"}
    assert {"allocated", "bytes by category", "activations"} <= tracks
    for event in events:
        if event["ph"] == "C":
            assert all(isinstance(size, int) for size in event["args"].values())


def test_perfetto_has_a_process_for_each_report(tmp_path: Path) -> None:
    write_perfetto([POINTS, POINTS], ["a", 'b "quoted"'], tmp_path / "trace.json")
    content = json.loads((tmp_path / "trace.json").read_text())
    names = [e["args"]["name"] for e in content["traceEvents"] if e["name"] == "process_name"]
    assert names == ["a (cuda:0)", 'b "quoted" (cuda:0)']
    assert content["displayTimeUnit"] == "ms"


def test_a_plot_is_a_picture_that_grows_with_the_reports(tmp_path: Path) -> None:
    heights = []
    for count in (1, 2):
        path = tmp_path / f"{count}.png"
        write_plot([POINTS] * count, ["$a_b$"] * count, path)
        content = path.read_bytes()
        assert content.startswith(PNG)
        heights.append(int.from_bytes(content[20:24], "big"))
    assert heights[1] > 1.5 * heights[0]


def test_reports_of_a_plot_share_one_scale(tmp_path: Path) -> None:
    write_plot(
        [report_of((0, "forward", 3 << 20), (9, "forward", 1 << 20)), POINTS], ["large", "small"], tmp_path / "p.svg"
    )
    assert (tmp_path / "p.svg").read_text().count("<!-- MiB -->") == 2


@pytest.mark.parametrize("points", [[], [(5, "forward", 1)]])
def test_a_report_with_hardly_a_timeline_is_drawn_too(points: list[tuple[int, str, int]], tmp_path: Path) -> None:
    write_plot([report_of(*points), MemoryReport.from_recording(Recording("cpu", 0))], ["a", "b"], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(PNG)


def test_a_plot_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    write_plot([POINTS], ["a"], tmp_path / "no suffix")
    assert [path.name for path in tmp_path.iterdir()] == ["no suffix"]
    assert (tmp_path / "no suffix").read_bytes().startswith(PNG)


def test_a_plot_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lightning-mpt\[plots\]'"):
        write_plot([POINTS], ["a"], tmp_path / "p.png")
