"""The command line: `lightning-mpt report FILE...`."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .profiler import MemoryReport


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 0, or 2 where a file cannot be read."""
    parser = argparse.ArgumentParser(
        prog="lightning-mpt", description="Where the memory of half-precision training with FP32 master weights goes."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="print saved memory reports; two or more side by side with the saving")
    report.add_argument("files", nargs="+", metavar="FILE", help="a memory_report.json; the first is the base")
    report.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    try:
        reports = [MemoryReport.load(file) for file in options.files]
    except (OSError, ValueError) as error:
        print(f"lightning-mpt report: {error}", file=sys.stderr)
        return 2
    return _report(reports, options.files, as_json=options.json)


def _report(reports: list[MemoryReport], files: list[str], *, as_json: bool) -> int:
    if as_json:
        rows = [{"file": file, **report.to_json()} for file, report in zip(files, reports, strict=True)]
        base = reports[0].peak_bytes
        for row in rows:
            row["saved_bytes"] = base - row["peak_bytes"]
        print(json.dumps(rows, indent=1))
    elif len(reports) == 1:
        reports[0].print()
    else:
        reports[0].compare(*reports[1:], names=_names(files)).print()
    return 0


def _names(files: list[str]) -> list[str]:
    """What tells the files apart: their names, or where these are the same, their folders'."""
    names = [Path(file).stem for file in files]
    if len(set(names)) == len(names):
        return names
    return [str(Path(file).with_suffix("")) for file in files]


if __name__ == "__main__":
    sys.exit(main())
