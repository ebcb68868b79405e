"""What is usually said of the memory of FP32 training, held against what was measured.

"Activations take 60 to 80 % of the peak, gradients 20 to 30 %, weights 5 to 10 %; half precision saves about half."
The numbers fit one network at one batch size. Here each is held against this one, with the reason where it is off.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from .category import Category
from .report import MemoryReport

FP32 = "32-true"
SHARES = {Category.ACTIVATIONS: (0.60, 0.80), Category.GRADIENTS: (0.20, 0.30), Category.WEIGHTS: (0.05, 0.10)}
"""Of the peak of FP32 training, as it is usually said."""
HALF = (0.40, 0.60)
"""What "about half" is taken to mean."""


@dataclass(frozen=True)
class Claim:
    """One thing that is said, and what was measured.

    Attributes:
        about: a category, or `saved`.
        low: the least that is said, as a share of the FP32 peak.
        high: the most.
        share: what was measured, in the same measure.
        why: where it does not hold, the reason; else "".
    """

    about: str
    low: float
    high: float
    share: float
    why: str

    @property
    def holds(self) -> bool:
        return self.low <= self.share <= self.high


def share_claims(base: MemoryReport) -> list[Claim]:
    """What is said of the shares of FP32 training, held against its report."""
    if not base.peak_bytes:
        return []
    claims = []
    for category, (low, high) in SHARES.items():
        share = _share(base, category)
        why = "" if low <= share <= high else _why(base, category, share < low)
        claims.append(Claim(category.value, low, high, share, why))
    return claims


def saved_claims(base: MemoryReport, other: MemoryReport) -> list[Claim]:
    """That about half is saved, held against one other precision."""
    if not base.peak_bytes:
        return []
    low, high = HALF
    share = (base.peak_bytes - other.peak_bytes) / base.peak_bytes
    why = ""
    if share < low:
        kept = [
            c for c in (Category.WEIGHTS, Category.MASTER_WEIGHTS, Category.OPTIMIZER_STATE) if other.categories.get(c)
        ]
        held = sum(other.categories[category] for category in kept)
        stays = other.categories.get(Category.OPTIMIZER_STATE, 0)
        if stays >= base.categories.get(Category.OPTIMIZER_STATE, 0) > 0:
            why = f"the optimizer's state stays as large as it was, {stays / base.peak_bytes:.0%} of the FP32 peak"
        elif kept:
            why = f"{_words(kept)} take {held / base.peak_bytes:.0%} of the FP32 peak as they are"
    elif share > high:
        why = "master weights and moments take fewer bits than FP32's too"
    return [Claim("saved", low, high, share, why)]


def left_out(base: MemoryReport) -> tuple[str, float] | None:
    """What the usual shares do not speak of, the optimizer's state, and its share; None where there is none."""
    share = _share(base, Category.OPTIMIZER_STATE)
    return (_optimizer(base), share) if share else None


def peak_phase(report: MemoryReport) -> str | None:
    """The phase in which the peak was reached."""
    if not report.phases:
        return None
    return max(report.phases, key=lambda name: report.phases[name].peak_bytes)


def _why(base: MemoryReport, category: Category, below: bool) -> str:
    model = sum(_share(base, c) for c in (Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE))
    activations = _share(base, Category.ACTIVATIONS)
    if category is Category.ACTIVATIONS:
        if below:
            return f"weights, gradients and optimizer state are {model:.0%} of it; a larger batch would shift that"
        return "the batch is large for this number of parameters"
    if category is Category.GRADIENTS:
        most = max((phase.categories.get(category, 0) for phase in base.phases.values()), default=0)
        at_peak = base.categories.get(category, 0)
        if below and most > at_peak:
            return (
                f"the peak falls in {_phase(base)}, when few of them are there; all of them would be "
                f"{most / base.peak_bytes:.0%}"
            )
    if below:
        return f"activations are {activations:.0%}, since the batch is large for this number of parameters"
    return f"activations are only {activations:.0%}, so that what grows with the parameters rules"


def _phase(report: MemoryReport) -> str:
    return (peak_phase(report) or "a step").replace("_", " ")


def _share(report: MemoryReport, category: Category) -> float:
    return report.categories.get(category, 0) / report.peak_bytes if report.peak_bytes else 0.0


def _optimizer(report: MemoryReport) -> str:
    return f"{report.optimizers[0]}'s state" if len(report.optimizers) == 1 else "optimizer state"


def _words(categories: Sequence[Category]) -> str:
    names = [category.value.replace("_", " ") for category in categories]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
