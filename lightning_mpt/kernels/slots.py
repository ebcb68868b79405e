"""What an update is given of each parameter, whichever kernel does it."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ..storage import Moment


class Slot(NamedTuple):
    """One parameter and all that its update reads and writes, the gradient apart.

    All but `step` have the parameter's shape. Master and moments are dense and run through memory as the weight does,
    or, if that is not dense, as its contiguous copy.
    """

    weight: Tensor
    """float16, bfloat16 or float32; written."""
    master: Tensor | None
    """As the storage keeps it; written. None where the weight is float32 and so its own master."""
    exp_avg: Moment
    """As the storage keeps it; written."""
    exp_avg_sq: Moment
    """The same."""
    max_exp_avg_sq: Moment | None
    """The same, of AMSGrad; else None."""
    step: Tensor
    """Number of steps, this one included: float32, no dimensions, on the weight's device; only read."""

    @property
    def moments(self) -> list[Moment]:
        """The moments there are, exp_avg first."""
        return [moment for moment in (self.exp_avg, self.exp_avg_sq, self.max_exp_avg_sq) if moment is not None]


class Slots(list[Slot]):
    """The slots of parameters that step together, step after step.

    A kernel keeps what it has worked out for these very slots as long as they live. So they never change: where
    something of a parameter does, others are made.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__

    @classmethod
    def of(cls, slots: Sequence[Slot]) -> "Slots":
        """The slots themselves if they are kept, else as such that last for one step."""
        return slots if isinstance(slots, cls) else cls(slots)


class GradientTransform(NamedTuple):
    """What makes a true gradient of what backward left."""

    multiplier: Tensor | float = 1.0
    """The clip coefficient over the loss scale: a number, or float32 without dimensions on the gradients' device."""
    clip_value: float | None = None
    """Largest magnitude of an element of the true gradient."""
