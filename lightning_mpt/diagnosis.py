"""What goes wrong, in words: why steps are skipped, settings under which weights stand still or are lost, and what
torch's errors about half types mean.

Nothing here runs in a step that goes well. Settings are looked at when training starts, weights and gradients when
several steps in a row were skipped, and weights once more when training is over.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from .optimizer import MasterAdamW
from .shards import local
from .skips import SkippedSteps
from .storage import is_float

LOST_SHARE = 2.0**-25
"""Half a unit in the last place of an FP32 number is at least this share of it: a change of less is lost."""
LARGEST_TYPICAL = 256.0
"""Weights are smaller on average: where the learning rate is above `LOST_SHARE` of this, none is looked at."""
SMALLEST_EPS = 2.0**-70
"""Adds something to every root: of a gradient smaller than this, (1 - 0.999) g**2 is 0 in FP32."""
HALF_MATTERS = ("Half", "BFloat16", "float16", "mixed dtype", "Simplex()")
"""What errors of torch's say where half is the reason: types, and what a distribution's probabilities are not quite."""


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
        for said in dict.fromkeys(unhelpful_settings(self._module, optimizers)):
            self._warn(said)

    def skipped(self, in_a_row: int) -> None:
        """A step was skipped, `in_a_row` of them by now: look for weights that are why. Waits for the device."""
        if in_a_row == 2:  # one alone is how a dynamic scale finds its height
            self._look_for_lost_weights()

    def check(
        self,
        skips: SkippedSteps,
        warn_after: int | None,
        error_after: int | None,
        released: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        """Warn, and then raise RuntimeError, where so many steps in a row were skipped at the lowest loss scale.

        `released`: where gradients are gone by now, what was found of each.
        """
        if skips.stuck == 0:
            self._warned = False
        elif error_after is not None and skips.stuck >= error_after:
            raise RuntimeError(self._stuck_message(skips, released))
        elif warn_after is not None and skips.stuck >= warn_after and not self._warned:
            self._warned = True
            self._warn(self._stuck_message(skips, released))

    def end(self) -> None:
        """Training is over: look at the weights a last time."""
        self._look_for_lost_weights()

    def _look_for_lost_weights(self) -> None:
        new = [name for name in lost_weights(self._module) if name not in self._lost]
        if new:
            self._lost.update(new)
            self._warn(
                f"{_listed(new)} became inf or NaN, and every step that this reaches is skipped.{self._range()} Go on "
                "from an earlier checkpoint, with a lower learning rate or more weight decay."
            )

    def _stuck_message(self, skips: SkippedSteps, released: Mapping[Tensor, Tensor] | None) -> str:
        """What is not finite, and where that began. Waits for the device."""
        parts, names = [], []
        for path, part in self._module.named_modules():
            own = part.named_parameters(path, recurse=False)
            if broken := [name for name, parameter in own if _broken(parameter, released)]:
                parts.append(f"{path or 'the module'} ({type(part).__name__})")
                names += broken
        if lost := lost_weights(self._module):
            cause = f"Weights hold inf or NaN themselves: {_listed(lost)}. Go on from an earlier checkpoint."
        elif self.loss is not None and not _finite(self.loss):
            cause = f"The loss is {self.loss.item():g} already: the trouble is in the forward pass, or in the data."
        else:
            cause = "The loss is finite: the trouble is in backward, in the first of these modules or after it."
        return (
            f"{skips.stuck} steps in a row were skipped: gradients are inf or NaN at loss scale {skips.scale:g}, which "
            f"can fall no further. Not finite now: {_listed(names)}. Their modules, the last first, as backward comes "
            f"to them: {_listed(parts[::-1])}. {cause} Look for inf or NaN in the data and the loss, or lower the "
            f"learning rate.{self._range()}"
        )

    def _range(self) -> str:
        if self._dtype == torch.bfloat16:
            return ""
        return " What passes 65504 is inf in float16; in 'bf16-true' the range is FP32's."


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
                f"eps={eps:g} is nothing in FP32: under tiny gradients weights leap, and where all were 0, an eps of 0 "
                "makes them 0 / 0, NaN. Give AdamW an eps such as 1e-8."
            )
        if "initial_lr" in group or not 0 < lr < LOST_SHARE * LARGEST_TYPICAL:
            continue
        still = [names.get(p, "a parameter") for p in group["params"] if p.requires_grad and lr < LOST_SHARE * _rms(p)]
        if still:
            yield (
                f"lr={lr:g} is too small to move most weights of {_listed(still)}: AdamW's step is about lr, and to an "
                "FP32 number less than 2**-25 of itself adds nothing. Use a larger one."
            )


def lost_weights(module: nn.Module) -> list[str]:
    """The names of parameters that hold inf or NaN. Waits for their device."""
    return [name for name, parameter in module.named_parameters() if not _finite(parameter)]


def _broken(parameter: Tensor, released: Mapping[Tensor, Tensor] | None) -> bool:
    """Whether the parameter has a gradient that is not finite, or had one."""
    if released is not None:
        return parameter in released and bool(released[parameter])
    return parameter.grad is not None and not _finite(parameter.grad)


def _finite(tensor: Tensor) -> bool:
    """Whether all is finite; of a sharded tensor, all that this process holds: others may not be asking."""
    held = local(tensor).detach()
    if held.numel() == 0 or not is_float(held):
        return True
    return all(math.isfinite(bound.item()) for bound in torch.aminmax(held))  # makes no copy, and NaN is both


def _rms(tensor: Tensor) -> float:
    held = local(tensor).detach()
    return torch.linalg.vector_norm(held, dtype=torch.float32).item() / math.sqrt(max(1, held.numel()))


def _listed(names: Sequence[str], most: int = 10) -> str:
    return (", ".join(names[:most]) or "none") + (f" and {len(names) - most} more" if len(names) > most else "")


def explain_half(error: BaseException, plugin: object, dtype: torch.dtype) -> None:
    """Say below an error of torch's about dtypes, from Python 3.11 on, what is half under the plugin and what not."""
    if hasattr(error, "add_note") and any(word in str(error) for word in HALF_MATTERS):
        error.add_note(
            f"Under {plugin!r} parameters, buffers and activations are {dtype}. A tensor that is no buffer "
            "stays FP32: register_buffer makes it one. So does what is in a batch that is an object of your own: "
            "cast it in on_after_batch_transfer. The .sum() of a whole tensor is FP32, and so is what a loss gives: "
            ".to(x.dtype) makes it half. What has no half kernels, or wants more digits, such as probabilities that "
            "sum to 1, takes x.float(), and its result is cast back by .to(x.dtype); a module is kept FP32 by "
            "fp32_modules=(TheModule,). Or let modules mix types by autocast=True."
        )
