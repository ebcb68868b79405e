"""What a precision plugin does whoever runs the loop, the Trainer or the user with Fabric.

convert          masters are taken from the FP32 weights, which then become half        conversion.py
adopt            AdamW is served by the fused step, other optimizers by FP32 masters    optimizer.py, bridge.py
forward          half products, FP32 sums and losses                                    fp32_functions.py, numerics.py
scale            the loss is FP32, and is scaled                                        loss_scale.py
update           one look at the gradients, then unscale, clip and update in one pass   kernels/
let go           the module is FP32 again, and everything global is what it was
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning_utilities import apply_to_collection
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Adam, AdamW, Optimizer

from .arguments import flag, module_types
from .base import Scan, unwrapped
from .bridge import BridgedOptimizer, bridge
from .conversion import ConvertedModule
from .diagnosis import Watch, explain_half
from .fp32_functions import FP32Functions
from .half_range import saturated
from .loss_scale import ConstantLossScale, DynamicLossScale, make_loss_scale
from .masters import MasterWeights
from .numerics import default_dtype, fp32_sums
from .optimizer import MasterAdamW
from .recomputation import recomputed_within
from .replicas import share_masters
from .schedules import HeldSchedules
from .shards import local
from .skips import SkippedSteps
from .storage import master_storage, moment_storage
from .upcast import Casts

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
        self._scaled_loss = not isinstance(self._loss_scale, ConstantLossScale) or self.loss_scale != 1.0
        self._went_backward = False
        """Whether a loss was scaled since training started."""
        self._gradients_scale = self._loss_scale.scale
        """The loss scale of the last backward: with several optimizers, the first one's step may change the scale."""
        self._master_weights = master_storage(master_weights).name
        self._optimizer_state = moment_storage(optimizer_state).name
        self._fp32_modules = module_types(fp32_modules)
        self._autocast = flag("autocast", autocast)
        self._masters = MasterWeights()
        self._converted: list[ConvertedModule] = []
        self._replicas: dict[ConvertedModule, DistributedDataParallel] = {}
        """What is around a module where every rank has a copy of it."""
        self._adopted: list[MasterAdamW | BridgedOptimizer] = []
        self._schedules = HeldSchedules()
        self._skips = SkippedSteps(self.loss_scale, self._on_skip)
        self._clips: dict[Optimizer, Clip] = {}
        self._grad_norm: Tensor | None = None
        self._watches: list[Watch] = []
        self._device_type = "cpu"
        self._casts = Casts()
        self._written: list[list[str]] = []
        """Names of the weights that somebody else writes to, of each module: what they are now, or were at the end."""

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
        for said in converted.worth_a_warning():
            rank_zero_warn(said)
        return converted

    def _train_on(self, device: torch.device) -> None:
        """From now on steps are taken on `device`."""
        self._device_type = device.type
        self._went_backward = False
        self._loss_scale.to(device)
        self._gradients_scale = self._loss_scale.scale
        self._skips.begin(self.loss_scale)

    def _join(self, model: nn.Module) -> None:
        """Start from the first rank's masters, where `model` is a converted module in DistributedDataParallel."""
        for converted in self._converted:
            if isinstance(model, DistributedDataParallel) and model.module is converted.module:
                self._replicas[converted] = model
                share_masters(model, converted.parameters, self._masters)

    def _adopt(self, optimizer: Optimizer) -> None:
        """Make this very optimizer step FP32 masters, until `_let_go`."""
        adopted: MasterAdamW | BridgedOptimizer
        if type(optimizer) in (Adam, AdamW):
            adopted = MasterAdamW.adopt(optimizer, self._masters, self._master_weights, self._optimizer_state)
        else:
            clip_noted = partial(self._clips.__contains__, optimizer)
            adopted = bridge(optimizer, self._masters, loss_scaled=self._scaled_loss, clip_noted=clip_noted)
        adopted.stepper = self._step_alone
        self._adopted.append(adopted)

    def _step_alone(self, optimizer: MasterAdamW | BridgedOptimizer) -> bool:
        if not self._went_backward:  # torch makes the state by a step over zeros, before it loads one
            return False
        with default_dtype(torch.float32):  # this may be within a training step, where it is half
            self._update(optimizer, self._clips.pop(optimizer, None))
        return True

    def _let_go(self) -> None:
        """Schedules, optimizers and modules are again what they were, with what they have learnt, in FP32."""
        self._written_weights()
        adopted, self._adopted = self._adopted, []
        converted, self._converted = self._converted, []
        self._replicas = {}
        self._schedules.release()
        # The bridge's parameters share the masters' memory, so optimizers let go before the modules take over.
        for optimizer in adopted:
            optimizer.release()
        for module in converted:
            module.restore()
        self._clips.clear()
        watches, self._watches = self._watches, []
        self._skips.learn(wait=True)
        for watch in watches:
            watch.end()

    # -- forward ------------------------------------------------------------------------------------------------

    def convert_input(self, data: Any) -> Any:
        """Floating tensors of a batch become half. What is finite stays so."""
        return apply_to_collection(data, Tensor, self._half_of)

    def _half_of(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return saturated(value, self._dtype) if value.itemsize > 2 else value.to(self._dtype)

    @contextmanager
    def forward_context(self) -> Generator[None, None, None]:
        """For forward: half by default, FP32 sums and losses; all as before afterwards, also after an exception."""
        for converted in self._converted:
            converted.take_replaced()
        with self._half_numerics():
            try:
                yield
            except (RuntimeError, TypeError, ValueError) as error:  # NotImplementedError is a RuntimeError
                explain_half(error, self, self._dtype)
                raise

    @contextmanager
    def _half_numerics(self) -> Generator[None, None, None]:
        """For forward and backward."""
        autocast: AbstractContextManager[Any] = nullcontext()
        if self._autocast:
            autocast = torch.autocast(self._device_type, dtype=self._dtype, cache_enabled=False)
        with ExitStack() as stack:
            for context in (default_dtype(self._dtype), fp32_sums(), self._fp32_functions(), autocast):
                stack.enter_context(context)
            stack.enter_context(recomputed_within(self._fp32_functions))
            yield

    def _fp32_functions(self) -> AbstractContextManager[Any]:
        return FP32Functions(self._casts)

    # -- backward and the step ----------------------------------------------------------------------------------

    def _scaled(self, loss: Tensor) -> Tensor:
        """The loss to run backward from."""
        self._went_backward = True
        for watch in self._watches:
            watch.loss = loss.detach()
        for converted in self._converted:
            replicas = self._replicas.get(converted)
            if replicas is not None and replicas.require_backward_grad_sync:
                converted.narrow_gradients()
            else:
                converted.widen_gradients()
        if len(self._adopted) > 1 and self._gradients_scale is not self._loss_scale.scale:
            self._rescale_kept_gradients()
        self._gradients_scale = self._loss_scale.scale
        for optimizer, clip in self._clips.items():
            self._clips[optimizer] = clip._replace(scan=None)  # that is out of date
        # FP32 first: a scale of 2**16 is inf in float16.
        return loss.float() * self._gradients_scale

    def _rescale_kept_gradients(self) -> None:
        """Another optimizer's step may have changed the scale since: what waits for more follows it."""
        ratio = self._loss_scale.scale / self._gradients_scale
        if self._device_type == "cpu" and ratio == 1:
            return
        kept = [local(p.grad) for optimizer in self._adopted for p in optimizer.parameters() if p.grad is not None]
        if kept:
            torch._foreach_mul_(kept, ratio)

    def _update(
        self,
        optimizer: MasterAdamW | BridgedOptimizer,
        clip: Clip | None,
        scan: Scan | None = None,
        released: Mapping[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Unscale, clip and update in one pass, or skip the step; then the loss scale and the host learn how it went.

        Args:
            optimizer: one that was adopted.
            clip: how to clip, if at all.
            scan: what is known of the gradients, where they need no look.
            released: where gradients are gone by now, what was found of each.
            kwargs: of the optimizer's `step`.

        Raises:
            RuntimeError: there is a loss scale, and the gradients cannot be scaled by it.
        """
        if self._scaled_loss and not self._went_backward and any(p.grad is not None for p in optimizer.parameters()):
            raise RuntimeError(
                f"No loss was multiplied by the loss scale of {self.loss_scale:g}, and the step would divide gradients "
                "by it: call self.manual_backward(loss) (fabric.backward(loss)) instead of loss.backward(), assign "
                "gradients within true_gradients(), or train with loss_scale=None."
            )
        if next(optimizer.parameters(), None) is None:  # nothing to look at: `configure_optimizers` returned None
            optimizer.step(**kwargs)
            return
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
        for watch in self._watches:
            watch.check(self._skips, self.warn_after_skips, self.error_after_skips, released)

    def _watch_over(self, module: nn.Module) -> None:
        """From now on say what goes wrong with the module's training."""
        watch = Watch(module, self._dtype, rank_zero_warn)
        watch.start(self._adopted)
        self._watches.append(watch)

    def _on_skip(self, optimizer: Optimizer) -> None:
        self._schedules.skipped(optimizer)
        for watch in self._watches:
            watch.skipped(self._skips.in_a_row)

    # -- the plugin's own state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The loss scale, the number of skipped steps, and what schedules owe for them, as Python numbers.

        And, where the user writes to weights as well, their names, for each module in the order of setting up.
        """
        written = self._written_weights()
        return {
            "loss_scale": self._loss_scale.state_dict(),
            "skipped_steps": self.skipped_steps,
            "held_schedules": self._schedules.state_dict(),
            **({"written_weights": written} if any(written) else {}),
        }

    def _written_weights(self) -> list[list[str]]:
        if self._converted:
            shared = self._masters.shared()
            self._written = [
                [name for parameter, name in converted.parameters.items() if parameter in shared]
                for converted in self._converted
            ]
        return self._written

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave. ValueError where something is missing, or is not what it should be."""
        entry, remedy = type(self).__name__, "without the entry, training goes on with a new loss scale."
        if not isinstance(state_dict, dict):
            raise ValueError(
                f"The checkpoint's entry {entry!r} is {state_dict!r}, and should be a dictionary: {remedy}"
            )
        missing = [name for name in ("loss_scale", "skipped_steps") if name not in state_dict]
        if missing:
            raise ValueError(f"The checkpoint's entry {entry!r} has {sorted(state_dict)} and lacks {missing}: {remedy}")
        skipped = state_dict["skipped_steps"]
        if not isinstance(skipped, int) or skipped < 0:
            raise ValueError(
                f"The checkpoint's entry {entry!r} has skipped_steps={skipped!r}, and should have a number of steps: "
                + remedy
            )
        self._load_scale(state_dict["loss_scale"])
        self._skips.total = skipped
        self._schedules.load_state_dict(state_dict.get("held_schedules", ()))
        self._written = state_dict.get("written_weights", [])
        self._expect_writes()

    def _expect_writes(self) -> None:
        for converted, names in zip(self._converted, self._written, strict=False):
            for parameter, name in converted.parameters.items():
                if name in names:
                    self._masters.expect_writes(parameter)

    def _reload(self, converted: ConvertedModule, path: str | Path | None, name: str | None) -> None:
        """Where torch has loaded a file into half parameters alone, give the masters the FP32 values that it holds."""
        if converted.values.reload(path, name):
            self._expect_writes()
        if converted.values.loaded_in_half:
            rank_zero_warn(
                f"{len(converted.values.loaded_in_half)} parameters were loaded in half precision: their masters start "
                "from the half values. Load a checkpoint that was saved with save_distributed_checkpoint=True."
            )
            converted.values.loaded_in_half.clear()

    def _load_scale(self, state_dict: dict[str, Any]) -> None:
        self._loss_scale.load_state_dict(state_dict)
        self._gradients_scale = self._loss_scale.scale
        self._skips.scale = self.loss_scale
