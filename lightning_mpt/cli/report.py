"""`lightning-mpt report FILE...`: print saved reports, or draw them."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..profiler import MemoryReport
from .target_options import CommandParser

Writer = Callable[[Sequence[MemoryReport], Sequence[str], Path], None]


def declare(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("files", nargs="+", metavar="FILE", help="a memory_report.json; the first is the base")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print JSON instead of tables")
    shown.add_argument(
        "--full", action="store_true", help="each report whole: the largest tensors, duplicates, allocator, all advice"
    )
    parser.add_argument("--html", type=Path, metavar="OUT", help="write one HTML file that needs nothing else")
    parser.add_argument("--plot", type=Path, metavar="OUT.png", help="draw the timelines; needs lightning-mpt[plots]")
    parser.add_argument("--perfetto", type=Path, metavar="OUT.json", help="write the timelines for ui.perfetto.dev")


def run(options: argparse.Namespace) -> int:
    """Run the command. Raises OSError or ValueError where a file cannot be read, or written."""
    reports = [MemoryReport.load(file) for file in options.files]
    names = _names(options.files)
    drawn = _draw(reports, names, options)
    if options.json:
        print(json.dumps(_rows(reports, options.files), indent=1))
    elif options.full or not drawn:
        _print(reports, names, full=options.full)
    return 0


def _draw(reports: Sequence[MemoryReport], names: Sequence[str], options: argparse.Namespace) -> bool:
    """Write the files that were asked for; says whether there was any."""
    asked = [(out, option) for option in ("html", "plot", "perfetto") if (out := getattr(options, option)) is not None]
    for out, option in asked:
        if any(out.resolve() == Path(file).resolve() for file in options.files):
            raise ValueError(f"--{option} {out} is one of the reports: give it a name of its own.")
        try:
            _writer(option)(reports, names, out)
        except ModuleNotFoundError as missing:
            raise ValueError(str(missing)) from missing
        print(f"wrote {out}", file=sys.stderr)
    return bool(asked)


def _writer(option: str) -> Writer:
    if option == "html":
        from ..profiler.show.html import write_html

        return write_html
    if option == "plot":
        from ..profiler.show.plot import write_plot

        return write_plot
    from ..profiler.show.perfetto import write_perfetto

    return write_perfetto


def _print(reports: Sequence[MemoryReport], names: Sequence[str], *, full: bool) -> None:
    if len(reports) == 1:
        reports[0].print(full=full)
        return
    reports[0].compare(*reports[1:], names=names).print()
    if full:
        for report, name in zip(reports, names, strict=True):
            print(f"\n{name}\n")
            report.print(full=True)


def _rows(reports: Sequence[MemoryReport], files: Sequence[str]) -> list[dict[str, Any]]:
    rows = [{"file": file, **report.to_json()} for file, report in zip(files, reports, strict=True)]
    base = reports[0].peak_bytes
    for row in rows:
        row["saved_bytes"] = base - row["peak_bytes"]
    return rows


def _names(files: Sequence[str]) -> list[str]:
    """What tells the files apart: their names, or where these are the same, their folders'."""
    names = [Path(file).stem for file in files]
    if len(set(names)) == len(names):
        return names
    return [str(Path(file).with_suffix("")) for file in files]
