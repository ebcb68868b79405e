"""The changes that would lower the peak: what each does to the categories of every phase, and what it costs.

- checkpointing repeated blocks: of each, what is saved for backward goes, but for its output (the next one's input);
  one block is there at a time, while backward computes it again, at the end among nearly all gradients;
- the storage of the model's state by lightning-mpt, and half precision itself where weights are FP32;
- waste: FP32 activations in a half-precision run, values kept in two precisions, outputs that the loop holds;
- where memory ran out, a smaller batch.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from ..category import MODEL_STATE, Category
from ..ledger import BACKWARD, CLIP, FORWARD, OPTIMIZER_STEP
from ..report import MemoryReport
from .tree import Node, module_tree, subtree_bytes
from .words import format_bytes, in_words

_HALF_BYTES = 2
_RELEASE = (
    "each gradient used and freed within backward (for one optimizer that the Trainer steps, on one device, without "
    "accumulation, clipping by norm or a dynamic loss scale)"
)
_ADAM = ("adam", "adamw", "masteradamw")
_NOT_COMPUTING = (CLIP, OPTIMIZER_STEP)
"""Phases in which nothing depends on the batch."""

IN_NO_MODULE = "outside the modules"
"""Where the loop itself works: where it computes the loss, say."""

Phases = Mapping[str, Mapping[Category, int]]
"""Phase -> its categories at its own peak."""
Change = Callable[[Phases], dict[str, dict[Category, int]]]


class Option(NamedTuple):
    """A change, and what it costs: 0 is nothing, 1 time, more is exactness."""

    text: str
    change: Change
    cost: int
    family: str


def options_for(report: MemoryReport) -> list[Option]:
    """Every change that this report gives reason for."""
    return [*_checkpointing(report), *_formats(report), *_waste(report), *_holding(report)]


def phases_of(report: MemoryReport) -> Phases:
    if report.phases:
        return {name: phase.categories for name, phase in report.phases.items()}
    return {"": report.categories}


def named(node: Node) -> str:
    return f"the {len(node.paths)} blocks {node.pattern}" if len(node.paths) > 1 else node.pattern


# -- checkpointing -------------------------------------------------------------------------------------------------


def _checkpointing(report: MemoryReport) -> list[Option]:
    """The repeated blocks that save most; and, where there are such, others that save much for far less time."""
    activations = subtree_bytes(report, Category.ACTIVATIONS)
    pass_ns = _forward_ns(report)
    found: list[tuple[float, float, Node, Change]] = []
    for node in module_tree(report).walk():
        if len(node.paths) < 2 or not all(path in report.forwards for path in node.paths):
            continue
        held = [activations.get(path, 0) for path in node.paths]
        freed = [max(0, size - report.forwards[path].output_bytes) for size, path in zip(held, node.paths, strict=True)]
        change = _recomputed(report, node.paths, held, freed)
        time_ns = sum(report.forwards[path].time_ns for path in node.paths)
        found.append((sum(freed) - _one_block(freed), time_ns / pass_ns if pass_ns else 0.0, node, change))
    if not found:
        return []
    best = max(found, key=lambda item: item[0])
    cheap = [item for item in found if item[0] >= best[0] / 2 and item[1] < best[1] / 2]
    return [_checkpoint(*item[1:]) for item in (best, *sorted(cheap, key=lambda item: -item[0])[:1])]


def _one_block(freed: list[int]) -> int:
    """What is there of the block that backward computes again when the new peak comes.

    At a peak in backward the block that backward is at is partly gone: it is the one that stays, as it is. Where less
    than half of it is there, the next one is the larger.
    """
    return min(freed) if min(freed) >= max(freed) / 2 else max(freed)


def _checkpoint(recomputed: float, node: Node, change: Change) -> Option:
    time = f", {recomputed:.0%} of a forward pass more" if recomputed else ""
    text = f"Checkpoint {named(node)}: keep only their inputs, and compute the rest again in backward{time}."
    return Option(text, change, 1, f"checkpoint {node.pattern}")


def _recomputed(report: MemoryReport, paths: tuple[str, ...], held: list[int], freed: list[int]) -> Change:
    """Of what every block at `paths` held, the bytes `freed` are there in backward only, while it is computed again.

    That has moments of its own: at the last block all that is kept is there; at the first, the gradients of all others
    are, and little else. What backward has in hand within a block is taken to be no more than the block.
    """
    fewer = _fewer_activations(report, sum(freed))
    block = _one_block(freed)
    weights = subtree_bytes(report, Category.WEIGHTS)
    others = 1 - max(weights.get(path, 0) for path in paths) / (weights.get("", 0) or 1)

    def change(phases: Phases) -> dict[str, dict[Category, int]]:
        after = fewer(phases)
        if BACKWARD in after:
            before = after[BACKWARD]
            kept = before.get(Category.ACTIVATIONS, 0)
            gradients = max(categories.get(Category.GRADIENTS, 0) for categories in phases.values())
            within = before | {Category.TEMPORARIES: min(before.get(Category.TEMPORARIES, 0), block)}
            at_last = within | {Category.ACTIVATIONS: kept + block}
            at_first = within | {Category.ACTIVATIONS: _one_block(held), Category.GRADIENTS: round(gradients * others)}
            after[BACKWARD] = max((before, at_last, at_first), key=lambda moment: sum(moment.values()))
        return after

    return change


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


def _formats(report: MemoryReport) -> list[Option]:
    if not report.parameters or any(name.lower() not in _ADAM for name in report.optimizers):
        return []
    most = {category: max(phase.get(category, 0) for phase in phases_of(report).values()) for category in Category}
    weight_bytes = 4 if most[Category.WEIGHTS] > 3 * report.parameters else 2
    trained = min(report.parameters, most[Category.GRADIENTS] // weight_bytes) or report.parameters
    if most[Category.OPTIMIZER_STATE] > 10 * trained:  # more than two moments: amsgrad
        return []
    now = sum(most[category] for category in MODEL_STATE) / report.parameters
    activations = _fp32_share(report) if weight_bytes == 4 else 0.0
    # By norm, clipping needs every gradient first; by value it does not, and a report does not tell which it was. Nor
    # does it tell of accumulation and of other devices, so the words do.
    may_release = CLIP not in report.phases and len(report.optimizers) == 1
    options = []
    for form in _FORMATS:
        if not form.gradients_kept and not may_release:
            continue
        name = f"MasterWeightPrecision({_arguments(report, bool(most[Category.MASTER_WEIGHTS]), form)})"
        half = "half precision with " if weight_bytes == 4 and form.cost == 0 else ""
        per_parameter = _HALF_BYTES * (1 + form.gradients_kept) + form.master_bytes + form.moment_bytes
        text = f"{name}: {half}{form.price}; {per_parameter:.3g} bytes per trained parameter, now {now:.3g}."
        options.append(Option(text, _stored(form, trained, weight_bytes, activations), form.cost, "formats"))
    if weight_bytes == 2 and most[Category.MASTER_WEIGHTS] and may_release:
        options.append(_release())
    return options


def _arguments(report: MemoryReport, has_masters: bool, form: _Format) -> str:
    if has_masters:
        return f"..., {form.arguments}"
    # A new plugin, of which `split` is the default.
    precision = "16-true" if any("float16" in own for own in report.activation_dtypes.values()) else "bf16-true"
    return f'"{precision}"' if form.cost == 0 else f'"{precision}", {form.arguments}'


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


def _release() -> Option:
    def change(phases: Phases) -> dict[str, dict[Category, int]]:
        return {name: _scaled(categories, {Category.GRADIENTS: 0.0}) for name, categories in phases.items()}

    text = f"MasterWeightPrecision(..., gradient_release=True): {_RELEASE}."
    return Option(text, change, 1, "formats")


def _fp32_share(report: MemoryReport) -> float:
    """How much of the activations at the peak is FP32; all where no type is known."""
    sums: dict[str, int] = {}
    for own in report.activation_dtypes.values():
        for dtype, size in own.items():
            sums[dtype] = sums.get(dtype, 0) + size
    whole = sum(sums.values())
    return sums.get("float32", 0) / whole if whole else 1.0


# -- waste, and the batch ------------------------------------------------------------------------------------------


def _waste(report: MemoryReport) -> list[Option]:
    options = []
    weights = max(phase.get(Category.WEIGHTS, 0) for phase in phases_of(report).values())
    if 0 < weights <= 3 * report.parameters:
        left = {path: own["float32"] for path, own in report.activation_dtypes.items() if own.get("float32")}
        if left:
            text = (
                f"{format_bytes(sum(left.values()))} of activations are FP32 in a half-precision run, most of them in "
                f"{_most(report, left)}: look for a .float() or an FP32 input there. In half they take half."
            )
            options.append(Option(text, _fewer_activations(report, sum(left.values()) / 2), 0, "fp32"))
    if report.duplicates:
        places: dict[str, int] = {}
        for double in report.duplicates:
            places[double.module] = places.get(double.module, 0) + double.bytes
        text = (
            f"{len(report.duplicates)} values are kept in two precisions, most of them in {_most(report, places)}: "
            "cast once, before whatever saves them, and the smaller copies go."
        )
        options.append(Option(text, _fewer_activations(report, sum(places.values())), 0, "duplicates"))
    return options


def _most(report: MemoryReport, sizes: Mapping[str, int]) -> str:
    """The module, or the modules that are alike, with the largest sum of `sizes`."""
    nodes = [(sum(sizes.get(path, 0) for path in node.paths), node) for node in module_tree(report).walk()]
    size, node = max(nodes, key=lambda item: item[0])
    return (named(node) if size else max(sizes, key=lambda path: sizes[path])) or "the root module"


def held_by_the_loop(report: MemoryReport) -> tuple[int, str]:
    """What was born in forward, is kept, and has no owner: bytes, and where most of it was born, `in` which module.

    Outputs that the loop keeps are; so are small states, such as that of the random numbers in a checkpoint.
    """
    held: dict[str, int] = {}
    outside = 0
    for tensor in report.tensors:
        if tensor.category is not Category.UNATTRIBUTED or tensor.phase != FORWARD:
            continue
        if tensor.module is None:
            outside += tensor.bytes
        else:
            held[tensor.module] = held.get(tensor.module, 0) + tensor.bytes
    inside = sum(held.values())
    return inside + outside, f"in {_most(report, held)}" if inside > outside else IN_NO_MODULE


def what_grows(report: MemoryReport) -> str | None:
    """That memory grows from step to step, by what, and what may be the reason; None where it does not."""
    growth = report.growth
    if growth is None:
        return None
    category = max(growth.categories, key=lambda category: growth.categories[category])
    place = f" from {_most(report, growth.modules)}" if growth.modules else ""
    return (
        f"Memory grew by {format_bytes(growth.step_bytes)} in every step, most of it {in_words(category)}{place}: if "
        "that goes on it runs out, whatever the batch. Look for what keeps what earlier steps made: a loss that is "
        "added up or listed with its graph (.item() or .detach() lets go of that), outputs or batches in a list."
    )


def _holding(report: MemoryReport) -> list[Option]:
    held_bytes, where = held_by_the_loop(report)
    if not held_bytes:
        return []

    def change(phases: Phases) -> dict[str, dict[Category, int]]:
        after = {name: dict(categories) for name, categories in phases.items()}
        for name in after.keys() - {FORWARD}:  # until its end the loss may need them
            after[name][Category.UNATTRIBUTED] = max(0, after[name].get(Category.UNATTRIBUTED, 0) - held_bytes)
        return after

    text = (
        f"Look for what keeps {format_bytes(held_bytes)} through backward, most of it born {where}, that autograd does "
        "not need: an output in a variable or in the dictionary that training_step returns, or what a module keeps in "
        "an attribute, as a cache. Let go of it before. (What torch.func and saved-tensor hooks of "
        "one's own keep is needed.)"
    )
    return [Option(text, change, 0, "holding")]


def smaller_batch(report: MemoryReport) -> list[Option]:
    scale = dict.fromkeys((Category.ACTIVATIONS, Category.INPUTS, Category.TEMPORARIES), 0.5)

    def change(phases: Phases) -> dict[str, dict[Category, int]]:
        return {
            name: dict(categories) if name in _NOT_COMPUTING else _scaled(categories, scale)
            for name, categories in phases.items()
        }

    text = "Half the batch, with accumulate_grad_batches twice as large: the same step, with half the activations."
    return [Option(text, change, 1, "batch")]
