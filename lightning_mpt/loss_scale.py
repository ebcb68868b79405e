"""Loss scaling: the loss is multiplied before backward, so that small fp16 gradients do not flush to zero.

fp16 has nothing below 2**-24, and in many networks most gradients are smaller (Micikevicius et al., arXiv 1710.03740,
section 3.2). Multiplying the loss by S moves all of them up by S; the update divides it out again, in FP32. A gradient
that becomes inf or NaN on the way says that S is too large: that step is skipped.

The scale and its counters are tensors on the training device, and their rule is arithmetic on them: nothing here waits
for the device. Where it differs from `torch.amp.GradScaler`: `hysteresis` forgives isolated overflows, and there is a
`min_scale`. With `hysteresis=1` and above `min_scale` the sequence of scales is the same.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor

FP32 = torch.finfo(torch.float32)
SCALE_RULE = "must be a positive finite number that float32 holds"


class LossScale(Protocol):
    """What the plugin asks of a loss scale."""

    def to(self, device: torch.device) -> None:
        """Move the scale's tensors to `device`."""
        ...

    @property
    def scale(self) -> Tensor:
        """The current scale: float32 without dimensions."""
        ...

    @property
    def at_minimum(self) -> Tensor:
        """Whether an overflow cannot lower the scale any more: bool without dimensions."""
        ...

    def update(self, found_inf: Tensor) -> None:
        """Learn how a step went: `found_inf` (float32 without dimensions) is not zero if it overflowed."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class ConstantLossScale:
    """The paper's constant: it never changes, and a step that overflows is still skipped.

    Args:
        scale: a positive finite number. A power of two loses nothing in rounding.
    """

    def __init__(self, scale: float) -> None:
        _check(_is_scale(scale), "scale", scale, SCALE_RULE, "1024.0")
        self._scale = torch.tensor(float(scale), dtype=torch.float32)

    def to(self, device: torch.device) -> None:
        self._scale = self._scale.to(device)

    @property
    def scale(self) -> Tensor:
        return self._scale

    @property
    def at_minimum(self) -> Tensor:
        return torch.ones_like(self._scale, dtype=torch.bool)

    def update(self, found_inf: Tensor) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        """Nothing: a constant comes from the code, so a resumed run may choose another."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def __repr__(self) -> str:
        return f"ConstantLossScale({self._scale.item()})"


class DynamicLossScale:
    """A scale that grows until gradients overflow, then backs off, and tries again.

    Args:
        init_scale: the first scale.
        growth_factor: the scale is multiplied by it after `growth_interval` clean steps in a row.
        backoff_factor: the scale is multiplied by it on an overflow.
        growth_interval: number of clean steps in a row.
        hysteresis: the scale backs off once this many overflows have come since the last growth; from then on at every
            overflow. Only growth refills it. 1 backs off at once.
        min_scale: the scale never falls below this.

    Raises:
        ValueError: a number is outside its range; the message names it.
    """

    def __init__(
        self,
        init_scale: float = 2.0**15,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        hysteresis: int = 1,
        min_scale: float = 1.0,
    ) -> None:
        for name, value in (("min_scale", min_scale), ("init_scale", init_scale)):
            _check(_is_scale(value), name, value, SCALE_RULE, "1.0")
        above = min_scale <= init_scale
        _check(above, "init_scale", init_scale, f"must be at least min_scale={min_scale!r}", "2.0**15")
        good_growth = _is_number(growth_factor) and 1 < growth_factor < math.inf
        _check(good_growth, "growth_factor", growth_factor, "must be a finite number above 1", "2.0")
        good_backoff = _is_number(backoff_factor) and 0 < backoff_factor < 1
        _check(good_backoff, "backoff_factor", backoff_factor, "must lie between 0 and 1", "0.5")
        for name, count in (("growth_interval", growth_interval), ("hysteresis", hysteresis)):
            good_count = isinstance(count, int) and not isinstance(count, bool) and count >= 1
            _check(good_count, name, count, "must be a whole number of at least 1", "1")
        self.init_scale = float(init_scale)
        self.growth_factor = float(growth_factor)
        self.backoff_factor = float(backoff_factor)
        self.growth_interval = growth_interval
        self.hysteresis = hysteresis
        self.min_scale = float(min_scale)
        self._scale = torch.tensor(self.init_scale, dtype=torch.float32)
        self._growth_tracker = torch.tensor(0, dtype=torch.int32)
        self._overflows_left = torch.tensor(hysteresis, dtype=torch.int32)

    def to(self, device: torch.device) -> None:
        self._scale = self._scale.to(device)
        self._growth_tracker = self._growth_tracker.to(device)
        self._overflows_left = self._overflows_left.to(device)

    @property
    def scale(self) -> Tensor:
        return self._scale

    @property
    def at_minimum(self) -> Tensor:
        return self._scale <= self.min_scale

    def update(self, found_inf: Tensor) -> None:
        overflow = found_inf != 0
        self._overflows_left = self._overflows_left - overflow.int()
        exact = self._scale.double()  # rounded once, as GradScaler does
        backed_off = (exact * self.backoff_factor).float().clamp(min=self.min_scale)
        clean_steps = torch.where(overflow, 0, self._growth_tracker + 1)
        grown = (exact * self.growth_factor).float()
        grows = clean_steps == self.growth_interval
        self._scale = torch.where(
            overflow,
            torch.where(self._overflows_left <= 0, backed_off, self._scale),
            # A scale that would be inf stays, as GradScaler's does, and the count starts again.
            torch.where(grows & grown.isfinite(), grown, self._scale),
        )
        self._overflows_left = torch.where(grows, self.hysteresis, self._overflows_left)
        self._growth_tracker = torch.where(grows, 0, clean_steps)

    def state_dict(self) -> dict[str, Any]:
        """The scale and its counters, as Python numbers."""
        return {
            "scale": self._scale.item(),
            "growth_tracker": self._growth_tracker.item(),
            "overflows_left": self._overflows_left.item(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a saved scale and counters, without them from the beginning; without a scale (of a constant's file,
        say) nothing.

        Raises:
            ValueError: a number is none, or outside its range; nothing has changed then.
        """
        if "scale" not in state_dict:
            return
        scale = state_dict["scale"]
        _check(_is_scale(scale), "scale", scale, SCALE_RULE, "1.0")
        counters = {"growth_tracker": 0, "overflows_left": self.hysteresis, **state_dict}
        for name in ("growth_tracker", "overflows_left"):
            _check(isinstance(counters[name], int), name, counters[name], "must be a whole number", "0")
        self._scale = torch.full_like(self._scale, max(scale, self.min_scale))
        self._growth_tracker = torch.full_like(self._growth_tracker, counters["growth_tracker"])
        self._overflows_left = torch.full_like(self._overflows_left, counters["overflows_left"])

    def __repr__(self) -> str:
        return (
            f"DynamicLossScale(init_scale={self.init_scale}, growth_factor={self.growth_factor}, "
            f"backoff_factor={self.backoff_factor}, growth_interval={self.growth_interval}, "
            f"hysteresis={self.hysteresis}, min_scale={self.min_scale})"
        )


def make_loss_scale(
    loss_scale: "float | str | DynamicLossScale | ConstantLossScale | None", dtype: torch.dtype
) -> LossScale:
    """The loss scale that a user's argument means, for training in `dtype` (float16 or bfloat16).

    `"auto"` is dynamic in float16 and none in bfloat16, whose range is FP32's. No scale is the constant 1.
    """
    if isinstance(loss_scale, DynamicLossScale | ConstantLossScale):
        return loss_scale
    if isinstance(loss_scale, str) and loss_scale == "auto":
        loss_scale = "dynamic" if dtype == torch.float16 else None
    if loss_scale is None:
        return ConstantLossScale(1.0)
    if isinstance(loss_scale, str) and loss_scale == "dynamic":
        return DynamicLossScale()
    if _is_scale(loss_scale):
        return ConstantLossScale(loss_scale)  # type: ignore[arg-type]
    raise ValueError(
        f"loss_scale={loss_scale!r} is not a loss scale: use 'auto', 'dynamic', None, a positive finite number that "
        "float32 holds, such as 1024, a DynamicLossScale or a ConstantLossScale."
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_scale(value: Any) -> bool:
    return _is_number(value) and FP32.tiny <= value <= FP32.max


def _check(good: bool, name: str, value: Any, rule: str, example: str) -> None:
    if not good:
        raise ValueError(f"{name}={value!r} {rule}, such as {example}.")
