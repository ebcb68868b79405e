"""`--model MODULE:CLASS --model.NAME VALUE`, and the same for `--data`: options that only the named class knows."""

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..profiler.compare.target import Target

DOTTED = ("model", "data")


class CommandParser(argparse.ArgumentParser):
    """An ArgumentParser that names the nearest option where it refuses one, and may take dotted options."""

    takes_target = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:  # type: ignore[override]
        # Taken out before argparse looks: it would not know `-1e-3` for a value.
        dotted: dict[str, dict[str, str]] = {name: {} for name in DOTTED}
        if self.takes_target:
            args = self._take_dotted(list(args or ()), dotted)
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self._refuse(unknown)
        if self.takes_target:
            options.target_arguments = dotted
        return options, unknown

    def _take_dotted(self, arguments: Sequence[str], dotted: dict[str, dict[str, str]]) -> list[str]:
        rest = []
        remaining = iter(arguments)
        for argument in remaining:
            option, equals, value = argument.partition("=")
            role, dot, name = option.removeprefix("--").partition(".")
            if not (argument.startswith("--") and dot and role in dotted):
                rest.append(argument)
                continue
            if not equals:
                value = next(remaining, None)  # type: ignore[assignment]
            if not name or value is None:
                self.error(f"{option} needs {'a name after the dot' if not name else 'a value'}: {option} VALUE")
            if name in dotted[role]:
                self.error(f"{option} is given twice: {dotted[role][name]!r} and {value!r}")
            dotted[role][name] = value
        return rest

    def _refuse(self, unknown: list[str]) -> NoReturn:
        option = unknown[0].partition("=")[0]
        known = [text for text in self._option_string_actions if text.startswith("--")]
        like = difflib.get_close_matches(option, known, n=1, cutoff=0.6)
        hint = f": did you mean {like[0]}?" if like else f". It takes {', '.join(known)}."
        if self.takes_target and not like:
            hint = hint[:-1] + ", and --model.NAME and --data.NAME for the constructors' arguments."
        self.error(f"{unknown[0]} is unknown to {self.prog}{hint}")


def add_target(parser: CommandParser) -> None:
    """Declare `--model`, `--data` and their arguments."""
    parser.takes_target = True
    parser.add_argument(
        "--model",
        metavar="MODULE:CLASS",
        help="the LightningModule: package.module:Class or folder/file.py:Class. Its constructor's arguments as "
        "--model.NAME VALUE",
    )
    parser.add_argument(
        "--data",
        metavar="MODULE:CLASS",
        help="the LightningDataModule or Dataset; needed unless the model has a train_dataloader. Its constructor's "
        "arguments as --data.NAME VALUE; a Dataset takes --data.batch_size too",
    )
    parser.add_argument(
        "--config",
        metavar="FILE.yaml",
        help="a LightningCLI configuration: its model and data sections are used, and of its trainer section the "
        "settings of clipping and accumulation. What is given beside it goes before it",
    )


def read_target(options: argparse.Namespace) -> Target:
    """The target that the options name. Raises ValueError where they name none."""
    arguments = options.target_arguments
    if options.model is None and options.config is None:
        raise ValueError(
            "nothing to train: name a LightningModule by --model MODULE:CLASS, or give --config FILE.yaml."
        )
    return Target(options.model, arguments["model"], options.data, arguments["data"], options.config)


def add_precisions(parser: CommandParser, default: str) -> None:
    """Declare `--precision`, and say in words what it is by default."""
    parser.add_argument(
        "--precision",
        nargs="+",
        action="extend",
        metavar="NAME",
        help=f"one or several; the first is what the others are measured against. Default: {default}",
    )


def add_output(parser: CommandParser) -> None:
    """Declare where the answer goes: `--save` and `--json`."""
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep the reports, for `lightning-mpt report`")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
