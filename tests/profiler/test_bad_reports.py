"""Files that are no report, or a damaged one: always a ValueError that says where, never another exception."""

import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from reports import transformer

from lightning_mpt.profiler import MemoryReport
from lightning_mpt.profiler.report import REPORT_LIMIT_BYTES
from lightning_mpt.profiler.show.render import report_text

from .damage import REMOVED, Change, changes, damaged

VALID = transformer(2).to_json()


def load(content: Any, folder: Path) -> MemoryReport:
    path = folder / "report.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return MemoryReport.load(path)


def test_a_report_comes_back_as_it_was(tmp_path: Path) -> None:
    assert load(VALID, tmp_path) == transformer(2)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (["peak_bytes"], None, "peak_bytes is missing"),
        (["peak_bytes"], "4 GiB", "peak_bytes is '4 GiB', not a whole number"),
        (["peak_bytes"], True, "peak_bytes is True, not a whole number"),
        (["peak_bytes"], 1.5, "peak_bytes is 1.5, not a whole number"),
        (["peak_bytes"], -1, "peak_bytes is -1, not 0 or more"),
        (["peak_bytes"], 10**30, "not a whole number of 64 bits"),
        (["categories"], [1], r"categories is \[1\], not an object"),
        (["categories", "coffee"], 3, "'coffee', not one of weights, master_weights"),
        (["categories", "weights"], "x", r"categories\['weights'\] is 'x'"),
        (["phases", "forward", "peak_bytes"], None, r"phases\['forward'\].peak_bytes is missing"),
        (["tensors", 3, "shape"], [2, "x"], r"tensors\[3\].shape\[1\] is 'x'"),
        (["tensors", 3, "category"], 7, r"tensors\[3\].category is 7, not one of"),
        (["duplicates", 0, "dtypes"], ["a"], r"duplicates\[0\].dtypes is \['a'\], not a list of 2"),
        (["forwards", "net"], 5, r"forwards\['net'\] is 5, not an object"),
        (["notes"], "one", "notes is 'one', not a list"),
        (["health", "retries"], "x" * 1000, r"health.retries is 'x{36}\.\.\., not"),
        (["modules", "a." * 5000], {}, "more than 200 levels deep"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(where: list[Any], value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        load(damaged(VALID, [(tuple(where), REMOVED if value is None else value)]), tmp_path)
    assert str(tmp_path / "report.json") in str(refusal.value)


def test_fields_that_came_later_may_be_missing_and_others_be_there(tmp_path: Path) -> None:
    without = {key: value for key, value in VALID.items() if key not in ("forwards", "health", "notes")}
    report = load({**without, "what comes next": 1}, tmp_path)
    assert (report.forwards, report.health, report.notes) == ({}, None, ())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (pickle.dumps({"format": "lightning-mpt-memory-report"}), "is not JSON"),
        ("{}".encode("utf-16"), "is not JSON"),
        (json.dumps(VALID).encode()[:-100], "is not JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b"1" * 10_000, "is not JSON"),
        (b'{"format": "' + b"x" * 10_000 + b'"}', "holds 'xxx"),
        (b'{"format": "lightning-mpt-memory-report", "version": 1}', "version 1 of .* reads version 2"),
    ],
    ids=["empty", "blank", "pickle", "utf-16", "truncated", "deep", "digits", "another format", "another version"],
)
def test_other_files_are_refused_in_one_line(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=message) as refusal:
        MemoryReport.load(path)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400 + len(str(path))


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    (tmp_path / "report.json").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match="is not JSON"):
        MemoryReport.load(tmp_path / "report.json")
    assert not (tmp_path / "executed").exists()


def test_a_gigabyte_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)  # a hole: it takes no room on the disk
    with pytest.raises(ValueError, match=f"1,073,741,824 bytes or more, and the limit is {REPORT_LIMIT_BYTES:,}"):
        MemoryReport.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_text, args=(json.dumps(VALID),))
    writer.start()
    assert MemoryReport.load(path) == transformer(2)
    writer.join()


def test_a_folder_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        MemoryReport.load(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=changes(VALID))
@example(made=[(("peak_bytes",), 0)])
@example(made=[(("phases",), {})])
@example(made=[(("parameters",), 0), (("forwards",), {})])
def test_a_damaged_report_is_shown_or_refused(made: list[Change], tmp_path: Path) -> None:
    try:
        report = load(damaged(VALID, made), tmp_path)
    except ValueError:
        return
    assert report.to_json()
    assert report_text(report, 60, full=True)
