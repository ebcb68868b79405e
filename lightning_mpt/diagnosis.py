"""What goes wrong, in words: why steps are skipped, and settings under which weights stand still or are lost.

Nothing here runs in a step that goes well. Settings are looked at when training starts, weights and gradients when
several steps in a row were skipped, and weights once more when training is over.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from .optimizer import MasterAdamW
from .skips import SkippedSteps

LOST_SHARE = 2.0**-25
"""Half a unit in the last place of an FP32 number is at least this share of it: a change of less is lost."""
LARGEST_TYPICAL = 256.0
"""Weights are smaller on average: where the learning rate is above `LOST_SHARE` of this, none is looked at."""
SMALLEST_EPS = 2.0**-70
"""Adds something to every root: of a gradient smaller than this, (1 - 0.999) g**2 is 0 in FP32."""


class Watch:
    """Follows one training run, and says what goes wrong.

    Args:
        module: the whole one.
        dtype: float16 or bfloat16, what its weights are in training.
        warn: is told, once for each trouble.

    Attributes:
        loss: the last one that went backward, one element, not scaled; set from outside.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, warn: Callable[[str], None]) -> None:
        self.loss: Tensor | None = None
        self._module = module
        self._dtype = dtype
        self._warn = warn
        self._warned = False
        self._lost: set[str] = set()

    def start(self, optimizers: Iterable[object]) -> None:
        """Look at the optimizers' settings."""
        for said in unhelpful_settings(self._module, optimizers):
            self._warn(said)

    def skipped(self, in_a_row: int) -> None:
        """A step was skipped, `in_a_row` of them by now: look for weights that are why. Waits for the device."""
        if in_a_row == 2:  # one alone is how a dynamic scale finds its height
            self._look_for_lost_weights()

    def check(self, skips: SkippedSteps, warn_after: int | None, error_after: int | None) -> None:
        """Warn, and then raise RuntimeError, where so many steps in a row were skipped at the lowest loss scale."""
        if skips.stuck == 0:
            self._warned = False
        elif error_after is not None and skips.stuck >= error_after:
            raise RuntimeError(stuck_message(self._module, skips, self.loss))
        elif warn_after is not None and skips.stuck >= warn_after and not self._warned:
            self._warned = True
            self._warn(stuck_message(self._module, skips, self.loss))

    def end(self) -> None:
        """Training is over: look at the weights a last time."""
        self._look_for_lost_weights()

    def _look_for_lost_weights(self) -> None:
        new = [name for name in lost_weights(self._module) if name not in self._lost]
        if new:
            self._lost.update(new)
            self._warn(lost_message(new, self._dtype))


def unhelpful_settings(module: nn.Module, optimizers: Iterable[object]) -> Iterator[str]:
    """What is sure to go wrong with AdamW's settings. Of other rules nothing is known.

    A learning rate that a schedule moves, and one of 0, which is meant, are as they should be.
    """
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = [group for one in optimizers if isinstance(one, MasterAdamW) for group in one.param_groups]
    for group in groups:
        lr, eps = float(group["lr"]), float(group["eps"])
        if eps < SMALLEST_EPS:
            yield (
                f"eps={eps:g} is nothing in FP32: a weight whose gradients were all 0 is divided 0 by 0 and becomes "
                "NaN, and under tiny gradients a weight leaps. Give AdamW an eps such as 1e-8."
            )
        if "initial_lr" in group or not 0 < lr < LOST_SHARE * LARGEST_TYPICAL:
            continue
        still = [names.get(p, "a parameter") for p in group["params"] if p.requires_grad and lr < LOST_SHARE * _rms(p)]
        if still:
            yield (
                f"lr={lr:g} is too small to move most weights of {_listed(still)}: AdamW's step is about lr, and an "
                f"FP32 number changes by no less than 2**-25 of itself. Use a larger one."
            )


def lost_weights(module: nn.Module) -> list[str]:
    """The names of parameters that hold inf or NaN. Waits for their device."""
    return [name for name, parameter in module.named_parameters() if not _finite(parameter.detach())]


def lost_message(names: Sequence[str], dtype: torch.dtype) -> str:
    """What became of these parameters, and what to do."""
    return (
        f"{_listed(names)} became inf or NaN. A weight whose master passes {torch.finfo(dtype).max:g} is inf in "
        f"{dtype}, and every step that uses it is skipped. Go on from an earlier checkpoint, with a lower learning "
        "rate, more weight decay, or in 'bf16-true', whose range is FP32's."
    )


def stuck_message(module: nn.Module, skips: SkippedSteps, loss: Tensor | None) -> str:
    """Why steps are skipped at the lowest scale: what is not finite, and where that began. Waits for the device."""
    parts, names = [], []
    for path, part in module.named_modules():
        own = part.named_parameters(path, recurse=False)
        broken = [name for name, parameter in own if parameter.grad is not None and not _finite(parameter.grad)]
        if broken:
            parts.append(f"{path or 'the module'} ({type(part).__name__})")
            names += broken
    lost = lost_weights(module)
    if lost:
        cause = f"Weights hold inf or NaN themselves: {_listed(lost)}. Go on from an earlier checkpoint."
    elif loss is not None and not _finite(loss):
        cause = f"The loss is {loss.item():g} already: the trouble is in the forward pass, or in the data."
    else:
        cause = "The loss is finite, so the trouble is in backward: look at the first of these modules, and after it."
    where = f" In the modules, the last first, as backward comes to them: {_listed(parts[::-1])}." if parts else ""
    return (
        f"{skips.stuck} steps in a row were skipped: gradients are inf or NaN at loss scale {skips.scale:g}, which can "
        f"fall no further. Not finite now: {_listed(names) or 'none'}.{where} {cause} Look for inf or NaN in the data "
        "and the loss, lower the learning rate, or train in 'bf16-true', whose range is FP32's."
    )


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _rms(tensor: Tensor) -> float:
    return torch.linalg.vector_norm(tensor.detach(), dtype=torch.float32).item() / math.sqrt(max(1, tensor.numel()))


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
