"""What is usually said of the memory of FP32 training, held against what was measured.

"Activations take 60 to 80 % of the peak, gradients 20 to 30 %, weights 5 to 10 %; half precision saves about half."
The numbers fit one network at one batch size. Here each is held against this one, with the reason where it is off.
"""

from dataclasses import dataclass

from ..category import Category
from ..report import MemoryReport
from .words import spoken

FP32 = "32-true"
SHARES = {Category.ACTIVATIONS: (0.60, 0.80), Category.GRADIENTS: (0.20, 0.30), Category.WEIGHTS: (0.05, 0.10)}
"""Of the peak of FP32 training, as it is usually said."""
HALF = (0.40, 0.60)
"""What "about half" is taken to mean."""

_MODEL = (Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE)
_PARTS = {
    "weights with their masters": (Category.WEIGHTS, Category.MASTER_WEIGHTS),
    "gradients": (Category.GRADIENTS,),
    "moments": (Category.OPTIMIZER_STATE,),
    "activations": (Category.ACTIVATIONS,),
    "temporaries": (Category.TEMPORARIES,),
    "other blocks": (Category.BUFFERS, Category.INPUTS, Category.ROUNDING, Category.UNATTRIBUTED),
}
"""What shrinks or does not, each as one."""


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
    why = "" if low <= share <= high else _what_moved(base, other, least=share < low)
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
    model = sum(_share(base, c) for c in _MODEL)
    activations, temporaries = _share(base, Category.ACTIVATIONS), _share(base, Category.TEMPORARIES)
    if category is Category.ACTIVATIONS:
        if not below:
            return "the batch is large for this number of parameters"
        if temporaries > model:
            return f"temporaries, born and gone within a phase, are {temporaries:.0%} of it"
        return f"weights, gradients and optimizer state are {model:.0%} of it; a larger batch would shift that"
    if category is Category.GRADIENTS and below:
        most = max((phase.categories.get(category, 0) for phase in base.phases.values()), default=0)
        if most > base.categories.get(category, 0):
            return (
                f"the peak falls in {_phase(base)}, when few of them are there; all of them would be "
                f"{most / base.peak_bytes:.0%}"
            )
    if below:
        rest = activations + temporaries
        if rest > 0.5:
            return f"activations and temporaries are {rest:.0%}: the batch is large for this number of parameters"
        return f"the optimizer's state is {_share(base, Category.OPTIMIZER_STATE):.0%}"
    return f"activations are only {activations:.0%}, so that what grows with the parameters rules"


def _what_moved(base: MemoryReport, other: MemoryReport, *, least: bool) -> str:
    """What is furthest from half of what it was: above it where the `least` was saved, else below."""
    off: dict[str, tuple[int, int]] = {}
    for part, categories in _PARTS.items():
        was, is_now = (sum(report.categories.get(c, 0) for c in categories) for report in (base, other))
        off[part] = (was, is_now)
    name = max(off, key=lambda part: (2 * off[part][1] - off[part][0]) * (1 if least else -1))
    before, after = (f"{size / base.peak_bytes:.0%}" for size in off[name])
    moved = f"go from {before} to {after}" if before != after else f"stay at {after}"
    return f"{name} {moved} of the FP32 peak"


def _phase(report: MemoryReport) -> str:
    return spoken(peak_phase(report) or "a step")


def _share(report: MemoryReport, category: Category) -> float:
    return report.categories.get(category, 0) / report.peak_bytes if report.peak_bytes else 0.0


def _optimizer(report: MemoryReport) -> str:
    return f"{report.optimizers[0]}'s state" if len(report.optimizers) == 1 else "optimizer state"
