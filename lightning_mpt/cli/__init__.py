"""The command line: `lightning-mpt COMMAND`. Each command is a module with `add(commands)` and `run(options)`."""

import argparse
import sys
from collections.abc import Sequence

from . import compare, estimate, report
from .target_options import CommandParser

COMMANDS = {"report": report, "compare": compare, "estimate": estimate}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 0, or 2 where the input is wrong, with one line that says how."""
    parser = argparse.ArgumentParser(
        prog="lightning-mpt", description="Where the memory of half-precision training with FP32 master weights goes."
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    for command in COMMANDS.values():
        command.add(commands)
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command].run(options)
    except (OSError, ValueError) as error:
        print(f"lightning-mpt {options.command}: {error}", file=sys.stderr)
        return 2
