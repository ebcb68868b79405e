"""Files that are no trace, or a damaged one: always a ValueError that says where, never another exception."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings

from lightning_mpt.profiler import AllocatorHealth, Category, Duplicate, MemoryReport, ModuleForward
from lightning_mpt.profiler.recording import Claim, Event, Gone, Interval, Mark, Recording, Window
from lightning_mpt.profiler.show.render import report_text

from .damage import REMOVED, Change, changes, damaged

WHOLE = Recording(
    device="cuda:0",
    parameters=100,
    start=[Event(0, 1, 512, 400), Event(0, 2, 512, 512)],
    events=[Event(11, 3, 1024, 1000), Event(22, 4, 512, 400), Event(31, 3, 0, 0), Event(45, 4, 0, 0)],
    claims=[
        Claim(5, 1, 400, Category.WEIGHTS, "net", (100,), "float32"),
        Claim(12, 3, 1000, Category.ACTIVATIONS, "net.act", (10, 25), "float32"),
        Claim(25, 4, 400, Category.GRADIENTS, "net", (100,), "float32"),
    ],
    phases=[Mark(1, "forward"), Mark(20, "backward", 18), Mark(40, "optimizer_step"), Mark(50, "")],
    modules=[Mark(2, "net"), Mark(15, None)],
    gone=[Gone(30, 2)],
    windows=[Window(1, 50, 2560)],
    reserved_bytes=4096,
    workspace_bytes=[512],
    bucket_bytes=[512],
    clock_error_ns=2,
    own=[Interval(16, 17)],
    forwards={"net": ModuleForward(1, 12, 1000)},
    duplicates=[Duplicate("net", (10, 25), ("float32", "bfloat16"), 500)],
    optimizers=["AdamW"],
    health=AllocatorHealth(4096, 0, 512, 0, 1 << 30, 0),
    notes=["One note."],
)


VALID = WHOLE.to_json()


def load(content: Any, folder: Path) -> MemoryReport:
    path = folder / "trace.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return MemoryReport.from_trace(path)


def test_a_trace_comes_back_as_it_was(tmp_path: Path) -> None:
    WHOLE.save(tmp_path / "trace.json")
    assert Recording.load(tmp_path / "trace.json") == WHOLE
    assert MemoryReport.from_trace(tmp_path / "trace.json") == MemoryReport.from_recording(WHOLE)


@pytest.mark.parametrize("name", [name for name in VALID if name not in ("format", "version")])
def test_nothing_may_be_missing(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name} is missing; expected a trace"):
        load(damaged(VALID, [((name,), REMOVED)]), tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("events",), {}, "events is {}, not a list"),
        (("events", 1), [1, 2, 3], r"events\[1\] is \[1, 2, 3\], not a list of 4"),
        (("events", 1, 2), "4 GiB", r"events\[1\]\[2\] is '4 GiB', not a whole number"),
        (("events", 1, 0), 1.5, r"events\[1\]\[0\] is 1.5, not a whole number"),
        (("claims", 2, 3), "coffee", r"claims\[2\]\[3\] is 'coffee', not one of weights, master_weights"),
        (("claims", 2, 5, 0), None, r"claims\[2\]\[5\]\[0\] is None, not a whole number"),
        (("claims", 0, 4), "a." * 300, "more than 200 levels deep"),
        (("phases", 1, 1), 7, r"phases\[1\]\[1\] is 7, not a string"),
        (("windows", 0, 2), -1, "peak_bytes is -1, not 0 or more"),
        (("forwards", "net", "calls"), REMOVED, r"forwards\['net'\].calls is missing"),
        (("duplicates", 0, "dtypes"), ["a"], r"duplicates\[0\].dtypes is \['a'\], not a list of 2"),
        (("claims_make_blocks",), 1, "claims_make_blocks is 1, not bool"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(place: Any, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load(damaged(VALID, [(place, value)]), tmp_path)
    assert str(tmp_path / "trace.json") in str(refusal.value)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=changes(VALID, -1, 20, 1 << 62, "activations", "backward"))
@example(made=[(("phases",), [])])
@example(made=[(("windows",), [])])
@example(made=[(("windows",), []), (("events",), [])])
@example(made=[(("failed_ns",), 25), (("phases",), [])])
@example(made=[(("claims_make_blocks",), True), (("start",), [])])
@example(made=[(("windows", 0, 1), -5)])
@example(made=[(("events", 0, 2), -5), (("start", 0, 2), -5)])
@example(made=[(("events", 0, 3), 0)])
def test_a_damaged_trace_is_shown_or_refused(made: list[Change], tmp_path: Path) -> None:
    try:
        report = load(damaged(VALID, made), tmp_path)
    except ValueError:
        return
    assert sum(report.categories.values()) == report.peak_bytes
    assert report_text(report, 60, full=True)
