"""`lightning-mpt estimate`: the table of `lightning-mpt compare`, told without running on any device."""

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout, suppress
from functools import partial
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from ..precisions import check_name
from ..presets import PRESETS
from ..profiler import MemoryReport
from ..profiler.compare.class_path import TargetError, one_line
from ..profiler.compare.run import FAILED, OK, Row, base_of, to_json
from ..profiler.estimate import NEEDS_VALUES, EstimateError, PerRank, Trial, largest_batch, per_rank
from .compare import INTERRUPTED, ON_CPU, ON_CUDA
from .target_options import CommandParser, add_output, add_precisions, add_target, read_target

FOR = {"cpu": ON_CPU, "cuda": ON_CUDA}
ON_A_DEVICE = "run `lightning-mpt compare` on a device"
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def declare(parser: CommandParser) -> None:
    """Declare the command's arguments."""
    add_target(parser)
    add_precisions(parser, ", ".join(FOR["cuda"]))
    parser.add_argument(
        "--device", "--accelerator", type=lambda name: "cuda" if name == "auto" else name, choices=tuple(FOR),
        default="cuda", help="whose kernels and allocator to imagine (default: cuda)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, metavar="N", help="cut or repeat the batch to N samples")
    parser.add_argument("--memory", metavar="SIZE", help="say the largest batch that fits: 24GiB, 80GB")
    parser.add_argument("--ranks", type=int, metavar="N", help="say what each of N ranks needs under DDP and FSDP2")
    compared = parser.add_argument_group("of lightning-mpt compare, whose call this is; they change no estimate")
    for name in ("--steps", "--seed", "--timeout"):
        compared.add_argument(name, type=float, metavar="N")
    add_output(parser)


def run(options: argparse.Namespace) -> int:
    """Run the command: 0, 1 where no precision worked, 130 after Ctrl-C.

    Raises OSError or ValueError where the input is wrong.
    """
    target = read_target(options)
    precisions = [check_name(name) for name in dict.fromkeys(options.precision or FOR[options.device])]
    memory_bytes = None if options.memory is None else size_in_bytes(options.memory)
    for name in ("batch_size", "ranks"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(options, name)}: give a whole number of at least 1")
    with redirect_stdout(sys.stderr):  # what a network prints is no part of the answer
        target.check()
        trial = Trial(target.build_model, target.build_data())
    if options.save is not None:
        options.save.mkdir(parents=True, exist_ok=True)

    ask = partial(estimate, trial, device=options.device, settings=target.trainer_settings())
    rows: list[Row] = []
    batches: dict[str, int | None] = {}
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    finished = False
    with suppress(KeyboardInterrupt), redirect_stdout(sys.stderr), bar as progress:
        for number, precision in enumerate(precisions, 1):
            name = f"{precision} ({number} of {len(precisions)})"
            task = progress.add_task(name)
            rows.append(_row(partial(ask, precision, batch_size=options.batch_size), precision))
            report = rows[-1].report
            if report is not None and options.save is not None:
                report.save(options.save / f"{precision.replace(':', '-')}.json")
            if report is not None and memory_bytes is not None:
                say = partial(progress.update, task)
                first = options.batch_size or trial.batch_size
                batches[precision] = _largest_batch(partial(ask, precision), memory_bytes, first, say, name)
            progress.remove_task(task)
        finished = True
    ranks = {row.precision: per_rank(row.report, options.ranks) for row in rows if options.ranks and row.report}
    if options.json:
        print(json.dumps(_json(rows, batches, ranks, memory_bytes), indent=1))
    else:
        from ..profiler.show.comparison import print_rows

        title = f"{target}, estimated for {options.device}"
        print_rows(rows, title, more=_more(rows, batches, ranks, options), remarks=_remarks(ranks))
    if not finished:
        print(f"lightning-mpt estimate: interrupted after {len(rows)} of {len(precisions)}", file=sys.stderr)
        return INTERRUPTED
    return 0 if base_of(rows) is not None else 1


def estimate(
    trial: Trial,
    precision: str,
    *,
    device: str = "cuda",
    batch_size: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> MemoryReport:
    """What one step of `trial` would need under a precision of that name.

    Args:
        trial: the module and its data.
        precision: one of `precisions.NAMES`.
        device: `cuda` or `cpu`: whose kernels and allocator to imagine.
        batch_size: cut or repeat the batch to that many samples; None for the size that it has.
        settings: further arguments of the Trainer, that change what a step does.

    Raises:
        EstimateError: the step needs values that only a run on a device has.
    """
    from .imagined import imagined_arguments, imagined_device

    return trial.run(
        lambda: {**(settings or {}), **imagined_arguments(precision)}, imagined_device(device), batch_size=batch_size
    )


def _row(ask: Callable[[], MemoryReport], precision: str) -> Row:
    try:
        return Row(precision, OK, ask())
    except TargetError as error:
        if not isinstance(error.__cause__, NEEDS_VALUES):
            raise
        return Row(precision, FAILED, error=f"{error} (on fake tensors; {ON_A_DEVICE})")
    except EstimateError as error:
        return Row(precision, FAILED, error=f"{error}: {ON_A_DEVICE}")
    except Exception as error:
        return Row(precision, FAILED, error=f"{one_line(error)} (on fake tensors; {ON_A_DEVICE})")


def _largest_batch(
    ask: Callable[..., MemoryReport], memory_bytes: int, first: int, say: Callable[..., None], name: str
) -> int | None:
    """None where a step of some other size cannot be run: batch norm refuses a single sample."""

    def peak_of(size: int) -> int:
        say(description=f"{name}, a batch of {size}")
        return ask(batch_size=size).peak_bytes

    try:
        return largest_batch(peak_of, memory_bytes, first)
    except Exception:
        return None


def size_in_bytes(text: str) -> int:
    """`24GiB`, `80GB` or `512M` as a number of bytes. Raises ValueError where it is no size."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]?i?)b?\s*", text.lower())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise ValueError(f"--memory {text!r} is not a size: write it as 24GiB, 80GB or 512MiB.")
    return int(float(match[1]) * UNITS[match[2]])


def _json(
    rows: Sequence[Row], batches: Mapping[str, int | None], ranks: Mapping[str, PerRank], memory_bytes: int | None
) -> list[dict[str, Any]]:
    content = to_json(rows)
    for row in content:
        if memory_bytes is not None:
            row["memory_bytes"] = memory_bytes
            row["largest_batch"] = batches.get(row["precision"])
        if row["precision"] in ranks:
            row["per_rank"] = {**vars(ranks[row["precision"]]), "ddp_bytes": _ddp_bytes(row["precision"], ranks)}
    return content


def _more(
    rows: Sequence[Row], batches: Mapping[str, int | None], ranks: Mapping[str, PerRank], options: argparse.Namespace
) -> dict[str, dict[str, int | None]]:
    """The table's further lines: label -> precision -> a number of samples, or of bytes."""
    lines: dict[str, dict[str, Any]] = {}
    if options.memory is not None:
        lines[f"largest batch in {options.memory}"] = {
            name: "unknown" if size is None else str(size or "none") for name, size in batches.items()
        }
    if ranks:
        lines[f"each of {options.ranks}, DDP"] = {name: _ddp_bytes(name, ranks) for name in ranks}
        lines[f"each of {options.ranks}, FSDP2"] = {name: each.fsdp2_bytes for name, each in ranks.items()}
    return lines


def _ddp_bytes(precision: str, ranks: Mapping[str, PerRank]) -> int | None:
    """None where gradients are released within backward: DDP would find none to reduce."""
    released = PRESETS.get(precision.partition(":")[2], {}).get("gradient_release", False)
    return None if released else ranks[precision].ddp_bytes


def _remarks(ranks: Mapping[str, PerRank]) -> list[str]:
    if not ranks:
        return []
    return [
        "Each rank with a batch of this size. DDP: all gradients once more, in buckets. FSDP2: a part of weights, "
        "masters, gradients and optimizer state, and gathered the root's weights, those of the two largest layers and "
        "one layer's gradients. NCCL's buffers are left out."
    ]
