"""What would lower the peak, in words with numbers. Pure arithmetic on a report.

Every phase has a peak of its own, and to lower one helps only down to the next highest. So a change is applied to the
categories of every phase, and what it saves is the highest phase before less the highest after.
"""

from dataclasses import dataclass

from ..category import Category
from ..report import MemoryReport
from .changes import (
    IN_NO_MODULE,
    Option,
    Phases,
    held_by_the_loop,
    named,
    options_for,
    phases_of,
    smaller_batch,
    what_grows,
)
from .timeline import last_phase
from .tree import module_tree
from .words import format_bytes, format_share, in_words, spoken

LEAST_SHARE = 0.01
"""Of the peak: what saves less is not worth a line."""
_LOSS = (
    ". The loss may be it: torch's mse_loss, smooth_l1_loss, soft_margin_loss and binary_cross_entropy give a scalar "
    "in a storage as large as the output, which loss.clone() lets go of"
)
"""Autograd tells of what it saves, and not from which tensor backward starts."""


@dataclass(frozen=True)
class Advice:
    """One thing to know or to do. `saves_bytes` is how much lower the peak would be; None where nothing is changed."""

    text: str
    saves_bytes: int | None


def advise(report: MemoryReport) -> tuple[Advice, ...]:
    """What holds the peak, and what would lower it by at least 1 %.

    Args:
        report: of whole training steps; or of the moment at which memory ran out. Then what would make room for the
            request that failed, where its size is known, comes first, and of every kind of change one before a second:
            few lines are shown, and three formats would be one idea.

    Returns:
        First what holds the peak, and that memory grows where it does; then what to do, most helpful first: the largest
        saving, where what costs neither time nor exactness counts a little more. The savings are each alone, not one
        after another.
    """
    failed_bytes = report.failed_request_bytes
    before = _moment(report) if report.out_of_memory else phases_of(report)
    peak_bytes, _ = _highest(before)
    if peak_bytes <= 0:
        return ()
    options = options_for(report)
    if report.out_of_memory:
        options += smaller_batch(report)
    weighed = [(option, _saved(option, before)) for option in options]
    weighed = _worth_it(weighed, LEAST_SHARE * peak_bytes)
    together = _together(weighed, before)
    if together is not None:
        weighed.append(together)
    if failed_bytes is None:
        weighed.sort(key=lambda item: -item[1] * (1 - 0.05 * item[0].cost))
    else:
        fits = failed_bytes
        weighed.sort(key=lambda item: (0, item[0].cost, -item[1]) if item[1] >= fits else (1, 0, -item[1]))
    if report.out_of_memory:
        weighed = _one_of_each_first(weighed)
    lines = [Advice(_what_holds(report, before), None)]
    if (grows := what_grows(report)) is not None:
        lines.append(Advice(grows, None))
    for option, saved in weighed:
        after_bytes, phase = _highest(option.change(before))
        left = f"the peak would be {format_bytes(after_bytes)}{_in(phase)}"
        if report.out_of_memory:
            left = f"{format_bytes(after_bytes)} would be in use"
        text = f"{option.text} Saves {format_bytes(saved)}, {format_share(saved, peak_bytes)}: {left}."
        if failed_bytes is not None and saved >= failed_bytes:
            text += f" That makes room for the {format_bytes(failed_bytes)} that failed."
        lines.append(Advice(text, saved))
    return tuple(lines)


def _moment(report: MemoryReport) -> Phases:
    """The peak alone, where that is the moment at which memory ran out: lowering any other makes no room there."""
    return {last_phase(report): report.categories}


def _highest(phases: Phases) -> tuple[int, str]:
    """The peak over all phases, and the phase that has it."""
    return max((sum(categories.values()), name) for name, categories in phases.items())


def _saved(option: Option, before: Phases) -> int:
    return _highest(before)[0] - _highest(option.change(before))[0]


def _worth_it(weighed: list[tuple[Option, int]], least_bytes: float) -> list[tuple[Option, int]]:
    """Without what saves too little, or little more than what costs less and is of the same family."""
    kept: list[tuple[Option, int]] = []
    for option, saved in sorted(weighed, key=lambda item: item[0].cost):
        milder = max((other for known, other in kept if known.family == option.family), default=0)
        if saved >= least_bytes and saved - milder >= least_bytes:
            kept.append((option, saved))
    return kept


def _one_of_each_first(weighed: list[tuple[Option, int]]) -> list[tuple[Option, int]]:
    """The first of every kind of change, then the others, both in the order that they have."""
    seen: set[str] = set()
    first: list[tuple[Option, int]] = []
    others: list[tuple[Option, int]] = []
    for item in weighed:
        kind = item[0].family.partition(" ")[0]
        (others if kind in seen else first).append(item)
        seen.add(kind)
    return first + others


def _together(weighed: list[tuple[Option, int]], before: Phases) -> tuple[Option, int] | None:
    """Checkpointing and the mildest half-precision format at once, where both help."""
    recomputing = [item for item in weighed if item[0].family.startswith("checkpoint")]
    formats = [item for item in weighed if item[0].family == "formats"]
    if not recomputing or not formats:
        return None
    recompute, state = max(recomputing, key=lambda item: item[1])[0], formats[0][0]

    def change(phases: Phases) -> dict[str, dict[Category, int]]:
        return state.change(recompute.change(phases))

    heads = " and ".join(option.text.partition(":")[0] for option in (recompute, state))
    option = Option(f"{heads}, both.", change, 1 + state.cost, "together")
    saved = _saved(option, before)
    best = max(recomputing[0][1], formats[0][1])
    return (option, saved) if saved - best >= LEAST_SHARE * _highest(before)[0] else None


# -- what holds the peak -------------------------------------------------------------------------------------------


def _what_holds(report: MemoryReport, before: Phases) -> str:
    peak_bytes, phase = _highest(before)
    categories = sorted(before[phase].items(), key=lambda item: -item[1])
    parts = [
        f"{in_words(category)} {format_share(size, peak_bytes)}"
        for category, size in categories[:3]
        if size >= 0.05 * peak_bytes
    ]
    where = f" in {spoken(phase)}" if phase else ""
    if (failed_bytes := report.failed_request_bytes) is not None:
        text = f"{format_bytes(failed_bytes)} more was asked for{where}, with {format_bytes(report.peak_bytes)} in use"
    elif report.out_of_memory:
        text = f"Memory ran out{where}, with {format_bytes(report.peak_bytes)} in use"
    else:
        text = f"The peak, {format_bytes(report.peak_bytes)}, is reached{where}"
    text += f": {', '.join(parts)}." if parts else "."
    largest = categories[0][0]
    block = max(
        (node for node in module_tree(report).walk() if len(node.paths) > 1),
        key=lambda node: node.total.get(largest, 0),
        default=None,
    )
    if block is not None and (size := block.total.get(largest, 0)) >= 0.5 * categories[0][1]:
        share = format_share(size, report.categories.get(largest, 0))
        text += f" Of the {in_words(largest)}, {share} are in {named(block)}."
    unattributed = before[phase].get(Category.UNATTRIBUTED, 0)
    if unattributed >= LEAST_SHARE * peak_bytes:
        held_bytes, where = held_by_the_loop(report)
        text += f" Unattributed, {format_share(unattributed, peak_bytes)}, has no owner that could be seen"
        if held_bytes >= LEAST_SHARE * peak_bytes:
            text += (
                f": {format_bytes(held_bytes)} of it were born in forward, most {where}, and are kept by something "
                "other than autograd: a variable of the loop, an attribute of a module, saved-tensor hooks of one's own"
            )
            if where == IN_NO_MODULE:
                text += _LOSS
        text += "."
    return text


def _in(phase: str) -> str:
    return f", in {spoken(phase)}" if phase else ""
