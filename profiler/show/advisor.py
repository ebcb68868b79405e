"""What would lower the peak, in words with numbers. Pure arithmetic on a report.

Every phase has a peak of its own, and to lower one helps only down to the next highest. So a change is applied to the
categories of every phase, and what it saves is the highest phase before less the highest after. Three kinds of change:

- checkpointing repeated blocks: of each, what is saved for backward goes, but for its output (the next one's input);
  one block is there at a time, while backward computes it again;
- the storage of the model's state by lightning-mpt, and half precision itself where weights are FP32;
- waste: FP32 activations in a half-precision run, values kept in two precisions.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..category import Category
from ..report import MemoryReport
from .tree import Node, module_tree, subtree_bytes
from .words import format_bytes, format_share

LEAST_SHARE = 0.01
"""Of the peak: what saves less is not worth a line."""
_HALF_BYTES = 2
_RELEASE = "each gradient used and freed within backward: no dynamic loss scale, clipping by norm or accumulation"
_ADAM = ("adam", "adamw", "masteradamw")
_NOT_COMPUTING = ("clip", "optimizer_step")
"""Phases in which nothing depends on the batch."""

Phases = Mapping[str, Mapping[Category, int]]
"""Phase -> its categories at its own peak."""
Change = Callable[[Phases], dict[str, dict[Category, int]]]


@dataclass(frozen=True)
class Advice:
    """One thing to know or to do. `saves_bytes` is how much lower the peak would be; None where nothing is changed."""

    text: str
    saves_bytes: int | None


class _Format(NamedTuple):
    """How lightning-mpt keeps what AdamW needs, in bytes per parameter beside the 2 of the half weight."""

    arguments: str
    master_bytes: float
    moment_bytes: float
    gradients_kept: bool
    price: str
    cost: int


_FORMATS = (
    # Read from lightning_mpt.storage: `split` keeps the 16 bits that the half weight lacks, `split8` 8 of them; `8bit`
    # moments are two codes of a byte and, for every 128 of each, an FP32 scale: 2 * (1 + 4 / 128).
    _Format('master_weights="split"', 2, 8, True, "exact FP32 masters and moments", 0),
    _Format('optimizer_state="bfloat16"', 2, 4, True, "exact masters, moments of 16 bits", 2),
    _Format('master_weights="split8", optimizer_state="8bit"', 1, 2.0625, True, "24-bit masters, 8-bit moments", 3),
    _Format(
        'master_weights="split8", optimizer_state="8bit", gradient_release=True',
        1,
        2.0625,
        False,
        f"24-bit masters, 8-bit moments, and {_RELEASE}",
        4,
    ),
)


class _Option(NamedTuple):
    """A change, and what it costs: 0 is nothing, 1 time, more is exactness."""

    text: str
    change: Change
    cost: int
    family: str


def advise(report: MemoryReport, failed_bytes: int | None = None) -> tuple[Advice, ...]:
    """What holds the peak, and what would lower it by at least 1 %.

    Args:
        report: of whole training steps; or of the moment at which memory ran out.
        failed_bytes: the request that could not be met. What would make room for it then comes first.

    Returns:
        First what holds the peak; then what to do, most helpful first: the largest saving, where what costs neither
        time nor exactness counts a little more. The savings are each alone, not one after another.
    """
    before = _phases(report) if failed_bytes is None else _moment(report)
    peak_bytes, _ = _highest(before)
    if peak_bytes <= 0:
        return ()
    options = [*_checkpointing(report), *_formats(report), *_waste(report)]
    if failed_bytes is not None:
        options += _smaller_batch(report)
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
    lines = [Advice(_what_holds(report, before, failed_bytes), None)]
    for option, saved in weighed:
        after_bytes, phase = _highest(option.change(before))
        left = f"{format_bytes(after_bytes)} would be in use"
        if failed_bytes is None:
            left = f"the peak would be {format_bytes(after_bytes)}{_in(phase)}"
        text = f"{option.text} Saves {format_bytes(saved)}, {format_share(saved, peak_bytes)}: {left}."
        if failed_bytes is not None and saved >= failed_bytes:
            text += f" That makes room for the {format_bytes(failed_bytes)} that failed."
        lines.append(Advice(text, saved))
    return tuple(lines)


def _phases(report: MemoryReport) -> Phases:
    if report.phases:
        return {name: phase.categories for name, phase in report.phases.items()}
    return {"": report.categories}


def _moment(report: MemoryReport) -> Phases:
    """The peak alone, where that is the moment at which memory ran out: lowering any other makes no room there."""
    phase = next((name for name, phase in report.phases.items() if phase.peak_bytes == report.peak_bytes), "")
    return {phase: report.categories}


def _highest(phases: Phases) -> tuple[int, str]:
    """The peak over all phases, and the phase that has it."""
    return max((sum(categories.values()), name) for name, categories in phases.items())


def _saved(option: _Option, before: Phases) -> int:
    return _highest(before)[0] - _highest(option.change(before))[0]


def _worth_it(weighed: list[tuple[_Option, int]], least_bytes: float) -> list[tuple[_Option, int]]:
    """Without what saves too little, or little more than what costs less and is of the same family."""
    kept: list[tuple[_Option, int]] = []
    for option, saved in sorted(weighed, key=lambda item: item[0].cost):
        milder = max((other for known, other in kept if known.family == option.family), default=0)
        if saved >= least_bytes and saved - milder >= least_bytes:
            kept.append((option, saved))
    return kept


def _together(weighed: list[tuple[_Option, int]], before: Phases) -> tuple[_Option, int] | None:
    """Checkpointing and the mildest half-precision format at once, where both help."""
    recomputing = [item for item in weighed if item[0].family.startswith("checkpoint")]
    formats = [item for item in weighed if item[0].family == "formats"]
    if not recomputing or not formats:
        return None
    recompute, state = max(recomputing, key=lambda item: item[1])[0], formats[0][0]

    def change(phases: Phases) -> dict[str, dict[Category, int]]:
        return state.change(recompute.change(phases))

    heads = " and ".join(option.text.partition(":")[0] for option in (recompute, state))
    option = _Option(f"{heads}, both.", change, 1 + state.cost, "together")
    saved = _saved(option, before)
    best = max(recomputing[0][1], formats[0][1])
    return (option, saved) if saved - best >= LEAST_SHARE * _highest(before)[0] else None


# -- what holds the peak -------------------------------------------------------------------------------------------


def _what_holds(report: MemoryReport, before: Phases, failed_bytes: int | None) -> str:
    peak_bytes, phase = _highest(before)
    categories = sorted(before[phase].items(), key=lambda item: -item[1])
    parts = [
        f"{category.value.replace('_', ' ')} {format_share(size, peak_bytes)}"
        for category, size in categories[:3]
        if size >= 0.05 * peak_bytes
    ]
    where = f" in {phase.replace('_', ' ')}" if phase else ""
    if failed_bytes is not None:
        text = f"{format_bytes(failed_bytes)} more were asked for{where}, with {format_bytes(report.peak_bytes)} in use"
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
        text += f" Of the {largest.value.replace('_', ' ')}, {share} are in {_blocks(block)}."
    return text


def _blocks(node: Node) -> str:
    return f"the {len(node.paths)} blocks {node.pattern}" if len(node.paths) > 1 else node.pattern


def _in(phase: str) -> str:
    return f", in {phase.replace('_', ' ')}" if phase else ""


# -- checkpointing -------------------------------------------------------------------------------------------------


def _checkpointing(report: MemoryReport) -> list[_Option]:
    """The repeated blocks that save most; and, where there are such, others that save much for far less time."""
    activations = subtree_bytes(report, Category.ACTIVATIONS)
    pass_ns = _forward_ns(report)
    found: list[tuple[float, float, Node]] = []
    for node in module_tree(report).walk():
        if len(node.paths) < 2 or not all(path in report.forwards for path in node.paths):
            continue
        freed = [max(0, activations.get(path, 0) - report.forwards[path].output_bytes) for path in node.paths]
        time_ns = sum(report.forwards[path].time_ns for path in node.paths)
        found.append((sum(freed) - _one_block(freed), time_ns / pass_ns if pass_ns else 0.0, node))
    if not found:
        return []
    best = max(found, key=lambda item: item[0])
    cheap = [item for item in found if item[0] >= best[0] / 2 and item[1] < best[1] / 2]
    return [_checkpoint(report, *item) for item in (best, *sorted(cheap, key=lambda item: -item[0])[:1])]


def _one_block(freed: list[int]) -> int:
    """What is there of the block that backward computes again when the new peak comes.

    At a peak in backward the block that backward is at is partly gone: it is the one that stays, as it is. Where less
    than half of it is there, the next one is the larger.
    """
    return min(freed) if min(freed) >= max(freed) / 2 else max(freed)


def _checkpoint(report: MemoryReport, freed_bytes: float, recomputed: float, node: Node) -> _Option:
    time = f", {recomputed:.0%} of a forward pass more" if recomputed else ""
    text = f"Checkpoint {_blocks(node)}: keep only their inputs, and compute the rest again in backward{time}."
    return _Option(text, _fewer_activations(report, freed_bytes), 1, f"checkpoint {node.pattern}")


def _forward_ns(report: MemoryReport) -> int:
    """Of the outermost modules that ran: the root's own forward is called by none in a LightningModule."""
    forwards = report.forwards
    return sum(forward.time_ns for path, forward in forwards.items() if not any(up in forwards for up in _above(path)))


def _above(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _fewer_activations(report: MemoryReport, freed_bytes: float) -> Change:
    """As large a share of every phase's activations goes as `freed_bytes` are of those at the peak."""
    held = report.categories.get(Category.ACTIVATIONS, 0)
    left = 1 - min(1.0, freed_bytes / held) if held else 1.0

    def change(phases: Phases) -> dict[str, dict[Category, int]]:
        return {name: _scaled(categories, {Category.ACTIVATIONS: left}) for name, categories in phases.items()}

    return change


def _scaled(categories: Mapping[Category, int], factors: Mapping[Category, float]) -> dict[Category, int]:
    return {category: round(size * factors.get(category, 1.0)) for category, size in categories.items()}


# -- the storage of the model's state ------------------------------------------------------------------------------


def _formats(report: MemoryReport) -> list[_Option]:
    if not report.parameters or any(name.lower() not in _ADAM for name in report.optimizers):
        return []
    most = {category: max(phase.get(category, 0) for phase in _phases(report).values()) for category in Category}
    weight_bytes = 4 if most[Category.WEIGHTS] > 3 * report.parameters else 2
    trained = min(report.parameters, most[Category.GRADIENTS] // weight_bytes) or report.parameters
    if most[Category.OPTIMIZER_STATE] > 10 * trained:  # more than two moments: amsgrad
        return []
    held = (Category.WEIGHTS, Category.MASTER_WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
    now = sum(most[category] for category in held) / report.parameters
    activations = _fp32_share(report) if weight_bytes == 4 else 0.0
    # By norm, clipping needs every gradient first; by value it does not, and a report does not tell which it was.
    may_release = "clip" not in report.phases
    options = []
    for form in _FORMATS:
        if not form.gradients_kept and not may_release:
            continue
        name = f"MasterWeightPrecision({_arguments(weight_bytes, form)})"
        half = "half precision with " if weight_bytes == 4 and form.cost == 0 else ""
        per_parameter = _HALF_BYTES * (1 + form.gradients_kept) + form.master_bytes + form.moment_bytes
        text = f"{name}: {half}{form.price}; {per_parameter:.3g} bytes per trained parameter, now {now:.3g}."
        options.append(_Option(text, _stored(form, trained, weight_bytes, activations), form.cost, "formats"))
    if weight_bytes == 2 and most[Category.MASTER_WEIGHTS] and may_release:
        options.append(_release())
    return options


def _arguments(weight_bytes: int, form: _Format) -> str:
    if weight_bytes == 4:  # a new plugin, and `split` is its default
        return '"bf16-true"' if form.cost == 0 else f'"bf16-true", {form.arguments}'
    return f"..., {form.arguments}"


def _stored(form: _Format, trained: int, weight_bytes: int, fp32_share: float) -> Change:
    narrower = _HALF_BYTES / weight_bytes
    halved = 1 - fp32_share / 2

    def change(phases: Phases) -> dict[str, dict[Category, int]]:
        after = {}
        for name, categories in phases.items():
            factors = {Category.WEIGHTS: narrower, Category.GRADIENTS: narrower * form.gradients_kept}
            if name not in _NOT_COMPUTING:
                factors |= {Category.ACTIVATIONS: halved, Category.TEMPORARIES: halved}
            after[name] = _scaled(categories, factors)
            after[name][Category.MASTER_WEIGHTS] = round(form.master_bytes * trained)
            after[name][Category.OPTIMIZER_STATE] = round(form.moment_bytes * trained)
        return after

    return change


def _release() -> _Option:
    def change(phases: Phases) -> dict[str, dict[Category, int]]:
        return {name: _scaled(categories, {Category.GRADIENTS: 0.0}) for name, categories in phases.items()}

    text = f"MasterWeightPrecision(..., gradient_release=True): {_RELEASE}."
    return _Option(text, change, 1, "formats")


def _fp32_share(report: MemoryReport) -> float:
    """How much of the activations at the peak is FP32; all where no type is known."""
    sums: dict[str, int] = {}
    for own in report.activation_dtypes.values():
        for dtype, size in own.items():
            sums[dtype] = sums.get(dtype, 0) + size
    return sums.get("float32", 0) / sum(sums.values()) if sums else 1.0


# -- waste, and the batch ------------------------------------------------------------------------------------------


def _waste(report: MemoryReport) -> list[_Option]:
    options = []
    weights = max(phase.get(Category.WEIGHTS, 0) for phase in _phases(report).values())
    if 0 < weights <= 3 * report.parameters:
        left = {path: own["float32"] for path, own in report.activation_dtypes.items() if own.get("float32")}
        if left:
            text = (
                f"{format_bytes(sum(left.values()))} of activations are FP32 in a half-precision run, most of them in "
                f"{_most(report, left)}: look for a .float() or an FP32 input there. In half they take half."
            )
            options.append(_Option(text, _fewer_activations(report, sum(left.values()) / 2), 0, "fp32"))
    if report.duplicates:
        places: dict[str, int] = {}
        for double in report.duplicates:
            places[double.module] = places.get(double.module, 0) + double.bytes
        text = (
            f"{len(report.duplicates)} values are kept in two precisions, most of them in {_most(report, places)}: "
            "cast once, before whatever saves them, and the smaller copies go."
        )
        options.append(_Option(text, _fewer_activations(report, sum(places.values())), 0, "duplicates"))
    return options


def _most(report: MemoryReport, sizes: Mapping[str, int]) -> str:
    """The module, or the modules that are alike, with the largest sum of `sizes`."""
    nodes = [(sum(sizes.get(path, 0) for path in node.paths), node) for node in module_tree(report).walk()]
    size, node = max(nodes, key=lambda item: item[0])
    return (_blocks(node) if size else max(sizes, key=lambda path: sizes[path])) or "the root module"


def _smaller_batch(report: MemoryReport) -> list[_Option]:
    scale = dict.fromkeys((Category.ACTIVATIONS, Category.INPUTS, Category.TEMPORARIES), 0.5)

    def change(phases: Phases) -> dict[str, dict[Category, int]]:
        return {
            name: dict(categories) if name in _NOT_COMPUTING else _scaled(categories, scale)
            for name, categories in phases.items()
        }

    text = "Half the batch, with accumulate_grad_batches twice as large: the same step, with half the activations."
    return [_Option(text, change, 1, "batch")]
