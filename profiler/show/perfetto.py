"""A report's timeline as Chrome trace events, which https://ui.perfetto.dev and chrome://tracing open.

Counter tracks (`"ph": "C"`): one stacked track of all categories, and one of the bytes in all. Phases are slices
(`"ph": "X"`) on a thread of their own. Times are microseconds from the beginning of the first counted step. Format:
"Trace Event Format", Google, 2016.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..report import MemoryReport
from .timeline import phase_spans, used_categories

_PHASES_THREAD = 1


def trace_events(report: MemoryReport, name: str = "memory", process: int = 1) -> list[dict[str, Any]]:
    """The events of one report, shown as a process called `name`."""
    used = used_categories(report)
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "process_name", "pid": process, "args": {"name": f"{name} ({report.device})"}},
        {"ph": "M", "name": "process_sort_index", "pid": process, "args": {"sort_index": process}},
        {
            "ph": "M",
            "name": "thread_name",
            "pid": process,
            "tid": _PHASES_THREAD,
            "args": {"name": "phases"},
        },
    ]
    for span in phase_spans(report):
        events.append(
            {
                "ph": "X",
                "name": span.phase,
                "cat": "phase",
                "pid": process,
                "tid": _PHASES_THREAD,
                "ts": span.start_ns / 1000,
                "dur": (span.end_ns - span.start_ns) / 1000,
                "args": {"highest_bytes": span.highest_bytes},
            }
        )
    for point in report.timeline:
        counter = {"ph": "C", "cat": "memory", "pid": process, "ts": point.time_ns / 1000}
        by_category = {category.value: point.categories.get(category, 0) for category in used}
        events.append({**counter, "name": "bytes by category", "args": by_category})
        for category, size in by_category.items():
            events.append({**counter, "name": category, "args": {"bytes": size}})
        events.append({**counter, "name": "allocated", "args": {"bytes": point.bytes}})
    return events


def write_perfetto(reports: Sequence[MemoryReport], names: Sequence[str], path: str | Path) -> None:
    """Write the reports to one file, each as a process of its own."""
    events: list[dict[str, Any]] = []
    for process, (report, name) in enumerate(zip(reports, names, strict=True), start=1):
        events += trace_events(report, name, process)
    content = {"traceEvents": events, "displayTimeUnit": "ms"}
    Path(path).write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")
