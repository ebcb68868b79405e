"""`lightning-mpt report FILE...`: print saved reports."""

import argparse
import json
from pathlib import Path
from typing import Any

from ..profiler import MemoryReport


def add(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser("report", help="print saved memory reports; two or more side by side with the saving")
    parser.add_argument("files", nargs="+", metavar="FILE", help="a memory_report.json; the first is the base")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(options: argparse.Namespace) -> int:
    """Run the command. Raises OSError or ValueError where a file cannot be read."""
    reports = [MemoryReport.load(file) for file in options.files]
    if options.json:
        rows = [{"file": file, **report.to_json()} for file, report in zip(options.files, reports, strict=True)]
        base = reports[0].peak_bytes
        for row in rows:
            row["saved_bytes"] = base - row["peak_bytes"]
        print(json.dumps(rows, indent=1))
    elif len(reports) == 1:
        reports[0].print()
    else:
        reports[0].compare(*reports[1:], names=_names(options.files)).print()
    return 0


def _names(files: list[str]) -> list[str]:
    """What tells the files apart: their names, or where these are the same, their folders'."""
    names = [Path(file).stem for file in files]
    if len(set(names)) == len(names):
        return names
    return [str(Path(file).with_suffix("")) for file in files]
