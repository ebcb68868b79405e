"""The command line: `lightning-mpt COMMAND`. Each command is a module with `declare(parser)` and `run(options)`."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from .target_options import CommandParser

COMMANDS = {
    "report": "print saved memory reports; two or more side by side with the saving",
    "compare": "train a network a few steps under several precisions, side by side",
    "estimate": "tell what a network's training would need under several precisions, without a device",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 0, or 2 where the input is wrong, with one line that says how."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="lightning-mpt", description="Where the memory of half-precision training with FP32 master weights goes."
    )
    commands = parser.add_subparsers(dest="command", required=True, parser_class=CommandParser)
    parsers = {name: commands.add_parser(name, help=does) for name, does in COMMANDS.items()}
    # Only the command that is asked for is imported: a saved report is printed without Lightning.
    if (name := next(iter(arguments), None)) in COMMANDS:
        command = import_module(f".{name}", __name__)
        command.declare(parsers[name])
    options = parser.parse_args(arguments)
    try:
        status: int = command.run(options)
    except (OSError, ValueError) as error:
        print(f"lightning-mpt {options.command}: {error}", file=sys.stderr)
        return 2
    return status
