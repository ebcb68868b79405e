"""What each of several ranks would need, by arithmetic on the report of one.

Every rank has a batch as large as the report's. With N ranks:

- DDP keeps everything on every rank, and all gradients once more in the buckets that it reduces
  (`gradient_as_bucket_view=False`, its default and Lightning's).
- FSDP2 keeps the N-th part of weights, masters, gradients and optimizer state. Beside it there are, gathered, the
  root's own weights, which stay so until backward is done, those of the two largest layers (the one that runs and the
  one that is fetched ahead), and the largest layer's gradients before they are reduced. A layer is what is one of a
  list of modules: `model.h.0`; what is in no list is the root's.

Communication buffers of NCCL are left out.
"""

from dataclasses import dataclass

from ..category import MODEL_STATE, Category
from ..ledger import OPTIMIZER_STEP
from ..report import MemoryReport


@dataclass(frozen=True)
class PerRank:
    """Bytes at the peak of one of `ranks`. `ddp_bytes` is None where gradients are released and DDP finds none."""

    ranks: int
    ddp_bytes: int | None
    fsdp2_bytes: int


def per_rank(report: MemoryReport, ranks: int) -> PerRank:
    """What a rank of `ranks` would need for the step of `report`. Raises ValueError for fewer than one."""
    if ranks < 1:
        raise ValueError(f"ranks={ranks}: there is 1 at least.")
    if ranks == 1:
        return PerRank(1, report.peak_bytes, report.peak_bytes)
    categories = report.categories
    gradients = _all_gradients(report)
    kept = sum(categories.get(category, 0) for category in MODEL_STATE)
    weights = _weights_by_layer(report)
    root = weights.pop("", 0)
    layers = sorted(weights.values(), reverse=True)
    in_use = root + sum(layers[:2])
    largest = layers[0] if layers else root
    total_weights = sum(layers) + root
    unreduced = largest * gradients // total_weights if total_weights else 0
    return PerRank(
        ranks,
        report.peak_bytes + gradients if gradients else None,
        report.peak_bytes - kept + -(-kept // ranks) + in_use + unreduced,
    )


def _all_gradients(report: MemoryReport) -> int:
    """Bytes of all gradients together: they are all there when the optimizer begins."""
    step = report.phases.get(OPTIMIZER_STEP)
    return 0 if step is None else step.categories.get(Category.GRADIENTS, 0)


def _weights_by_layer(report: MemoryReport) -> dict[str, int]:
    """Layer -> bytes of its weights; `""` is what is in no layer."""
    layers: dict[str, int] = {}
    for path, own in report.modules.items():
        parts = path.split(".")
        number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
        layer = "" if number is None else ".".join(parts[: number + 1])
        layers[layer] = layers.get(layer, 0) + own.get(Category.WEIGHTS, 0)
    return layers
