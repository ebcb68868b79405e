"""What a precision plugin does whoever runs the loop, the Trainer or the user with Fabric.

convert          masters are taken from the FP32 weights, which then become half        conversion.py
adopt            AdamW is served by the fused step, other optimizers by FP32 masters    optimizer.py, bridge.py
forward          half products, FP32 sums and losses                                    numerics.py
scale            the loss is FP32, and is scaled                                        loss_scale.py
update           one look at the gradients, then unscale, clip and update in one pass   kernels/
let go           the module is FP32 again, and everything global is what it was
"""

from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from lightning_utilities import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import LBFGS, Adam, AdamW, Optimizer, SparseAdam

from .base import Scan
from .bridge import BridgedOptimizer, bridge
from .conversion import RUNNING_NORMS, ConvertedModule
from .loss_scale import ConstantLossScale, DynamicLossScale, make_loss_scale
from .masters import MasterWeights
from .numerics import FP32Losses, default_dtype, fp32_sums
from .optimizer import MasterAdamW
from .schedules import HeldSchedules
from .skips import SkippedSteps
from .storage import master_storage, moment_storage

DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class Clip(NamedTuple):
    """How the true gradients are to be clipped."""

    limit: float
    by_norm: bool
    scan: Scan | None = None
    """Where the gradients have been looked at already."""


class MasterWeightPipeline:
    """The part in front of Lightning's own plugin class. The arguments are those of `MasterWeightPrecision`."""

    precision: Any

    warn_after_skips: int | None = 25
    error_after_skips: int | None = 100

    def __init__(
        self,
        precision: str,
        loss_scale: float | str | DynamicLossScale | ConstantLossScale | None,
        master_weights: str,
        optimizer_state: str,
        fp32_modules: type[nn.Module] | Sequence[type[nn.Module]] | None,
        autocast: bool,
    ) -> None:
        if not isinstance(precision, str) or precision not in DTYPES:
            raise ValueError(
                f"precision={precision!r} is not one of {', '.join(map(repr, DTYPES))}: {type(self).__name__} trains "
                "in half precision; for anything else use Lightning's own precision=..."
            )
        self.precision = precision
        self._dtype = DTYPES[precision]
        self._loss_scale = make_loss_scale(loss_scale, self._dtype)
        self._gradients_scale = self._loss_scale.scale
        """The loss scale of the last backward: with several optimizers, the first one's step may change the scale."""
        self._master_weights = master_storage(master_weights).name
        self._optimizer_state = moment_storage(optimizer_state).name
        self._fp32_modules = _module_types(fp32_modules)
        self._autocast = autocast
        self._masters = MasterWeights()
        self._converted: list[ConvertedModule] = []
        self._adopted: list[MasterAdamW | BridgedOptimizer] = []
        self._schedules = HeldSchedules()
        self._skips = SkippedSteps(self.loss_scale, self._schedules.skipped)
        self._clips: dict[Optimizer, Clip] = {}
        self._grad_norm: Tensor | None = None
        self._warned = False
        self._device_type = "cpu"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.precision!r})"

    # -- what a user may ask ------------------------------------------------------------------------------------

    @property
    def loss_scale(self) -> float:
        """The current loss scale (1.0 without one). On CUDA, asking waits for the device."""
        return float(self._loss_scale.scale)

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped because a gradient was not finite. On CUDA, asking waits for the device."""
        self._skips.learn(wait=True)
        return self._skips.total

    @property
    def grad_norm(self) -> float | None:
        """The last step's gradient norm, unscaled, before clipping by norm; None where none was taken."""
        return None if self._grad_norm is None else float(self._grad_norm)

    def master_params(self, optimizer: Optimizer | Any) -> list[Tensor]:
        """The FP32 master weights of an optimizer's parameters, in their order, while it trains. Read only.

        A `LightningOptimizer` will do, and what `Fabric.setup` gives.
        """
        adopted = unwrapped(optimizer)
        if not isinstance(adopted, MasterAdamW | BridgedOptimizer):
            raise ValueError(
                f"{type(adopted).__name__} has no master weights: ask while it trains, with an optimizer that the "
                "Trainer or Fabric has set up."
            )
        return adopted.master_params()

    def memory_categories(self) -> Generator[tuple[str, Tensor, Tensor], None, None]:
        """For the memory profiler: the FP32 values of all parameters, frozen ones among them."""
        for parameter, stored in self._masters:
            yield "master_weights", stored, parameter

    # -- setting up and letting go ------------------------------------------------------------------------------

    def _convert(self, module: nn.Module) -> ConvertedModule:
        """Make the module half, and FP32 seen from outside."""
        converted = ConvertedModule(module, self._dtype, self._masters, self._fp32_modules)
        self._converted.append(converted)
        if converted.was_half:
            count, first = len(converted.was_half), converted.was_half[0]
            rank_zero_warn(
                f"{count} parameters ({first} first) were half precision already: their FP32 masters start from the "
                "half values. Hand over the FP32 module to start from all its bits."
            )
        return converted

    def _train_on(self, device: torch.device) -> None:
        """From now on steps are taken on `device`."""
        self._device_type = device.type
        self._loss_scale.to(device)
        self._gradients_scale = self._loss_scale.scale
        self._skips.scale, self._skips.stuck = self.loss_scale, 0

    def _adopt(self, optimizer: Optimizer) -> None:
        """Make this very optimizer step FP32 masters, until `_let_go`."""
        if type(optimizer) in (Adam, AdamW):
            self._adopted.append(
                MasterAdamW.adopt(optimizer, self._masters, self._master_weights, self._optimizer_state)
            )
        else:
            self._adopted.append(bridge(optimizer, self._masters))

    def _let_go(self) -> None:
        """Schedules, optimizers and modules are again what they were, with what they have learnt, in FP32."""
        adopted, self._adopted = self._adopted, []
        converted, self._converted = self._converted, []
        self._schedules.release()
        # The bridge's parameters share the masters' memory, so optimizers let go before the modules take over.
        for optimizer in adopted:
            optimizer.release()
        for module in converted:
            module.restore()
        self._clips.clear()
        self._skips.learn(wait=True)

    # -- forward ------------------------------------------------------------------------------------------------

    def convert_input(self, data: Any) -> Any:
        """Floating tensors of a batch become half."""
        return apply_to_collection(data, Tensor, lambda t: t.to(self._dtype) if t.is_floating_point() else t)

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """Half by default, FP32 sums and losses; all as before afterwards, also after an exception."""
        autocast: AbstractContextManager[Any] = nullcontext()
        if self._autocast:
            autocast = torch.autocast(self._device_type, dtype=self._dtype, cache_enabled=False)
        with ExitStack() as stack:
            for context in (default_dtype(self._dtype), fp32_sums(), FP32Losses(), autocast):
                stack.enter_context(context)
            yield

    # -- backward and the step ----------------------------------------------------------------------------------

    def _scaled(self, loss: Tensor) -> Tensor:
        """The loss to run backward from."""
        for converted in self._converted:
            converted.widen_gradients()
        self._gradients_scale = self._loss_scale.scale
        self._clips = {optimizer: clip._replace(scan=None) for optimizer, clip in self._clips.items()}  # out of date
        # FP32 first: a scale of 2**16 is inf in float16.
        return loss.float() * self._gradients_scale

    def _update(
        self, optimizer: MasterAdamW | BridgedOptimizer, clip: Clip | None, scan: Scan | None = None, **kwargs: Any
    ) -> None:
        """Unscale, clip and update in one pass, or skip the step; then the loss scale and the host learn how it went.

        Args:
            optimizer: one that was adopted.
            clip: how to clip, if at all.
            scan: what is known of the gradients, where they need no look.
            kwargs: of the optimizer's `step`.
        """
        by_norm = clip is not None and clip.by_norm
        if scan is None and clip is not None:
            scan = clip.scan
        found_inf, norm = optimizer.scan_gradients(norm=by_norm) if scan is None else scan
        divisor = scale = self._gradients_scale
        self._grad_norm = None
        if clip is not None and norm is not None:
            self._grad_norm = norm / scale
            # As torch.nn.utils.clip_grad_norm_: min(1, clip / (norm + 1e-6)), folded into the division by the scale.
            divisor = scale * ((self._grad_norm + 1e-6) / clip.limit).clamp(min=1.0)
        optimizer.grad_scale, optimizer.found_inf = divisor, found_inf
        optimizer.clip_value = clip.limit if clip is not None and not by_norm else None
        try:
            optimizer.step(**kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf, optimizer.clip_value
        at_minimum = self._loss_scale.at_minimum
        self._loss_scale.update(found_inf)
        self._skips.record(found_inf, at_minimum, self._loss_scale.scale, optimizer)
        self._skips.learn()
        self._complain_if_stuck()

    def _complain_if_stuck(self) -> None:
        """Many skipped steps in a row and no lower scale to try: training is going nowhere."""
        stuck = self._skips.stuck
        if stuck == 0:
            self._warned = False
        elif self.error_after_skips is not None and stuck >= self.error_after_skips:
            raise RuntimeError(self._stuck_message())
        elif self.warn_after_skips is not None and stuck >= self.warn_after_skips and not self._warned:
            self._warned = True
            rank_zero_warn(self._stuck_message())

    def _stuck_message(self) -> str:
        broken = [
            name
            for converted in self._converted
            for parameter, name in converted.parameters.items()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]
        listed = ", ".join(broken[:10]) + (f" and {len(broken) - 10} more" if len(broken) > 10 else "")
        return (
            f"{self._skips.stuck} steps in a row were skipped: gradients are inf or NaN at loss scale "
            f"{self.loss_scale:g}, which can fall no further. Not finite now: {listed or 'none'}. Look for inf or NaN "
            "in the data and the loss, lower the learning rate, or train in 'bf16-true', whose range is FP32's."
        )

    # -- the plugin's own state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The loss scale and the number of skipped steps, as Python numbers."""
        return {"loss_scale": self._loss_scale.state_dict(), "skipped_steps": self.skipped_steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        self._loss_scale.load_state_dict(state_dict["loss_scale"])
        self._gradients_scale = self._loss_scale.scale
        self._skips.total = state_dict["skipped_steps"]


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside what the Trainer or Fabric hands to users."""
    return getattr(optimizer, "optimizer", optimizer)


def refuse_optimizer(optimizer: Any) -> None:
    """ValueError or TypeError, with the reason, for what cannot step FP32 masters."""
    name = type(optimizer).__name__
    if isinstance(optimizer, LBFGS):
        raise ValueError(
            f"{name} evaluates the loss many times within a step, which loss scaling cannot follow: "
            "use another optimizer, or precision='32-true'."
        )
    if isinstance(optimizer, SparseAdam):
        raise ValueError(f"{name} takes sparse gradients, and the update takes dense ones only: use AdamW.")
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name} is not a torch.optim.Optimizer; masters are kept for one's parameters: use one.")


def _module_types(given: Any) -> tuple[type[nn.Module], ...]:
    if given is None:
        return RUNNING_NORMS
    types = (given,) if isinstance(given, type) else given
    if not isinstance(types, tuple | list) or not all(isinstance(t, type) and issubclass(t, nn.Module) for t in types):
        raise ValueError(
            f"fp32_modules={given!r} must be module types, such as (torch.nn.BatchNorm2d, torch.nn.LayerNorm)."
        )
    return tuple(types)
