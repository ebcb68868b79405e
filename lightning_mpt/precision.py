"""The Trainer plugin: when what happens. The parts are in the other modules.

convert_module   masters are taken from the FP32 weights, which then become half        conversion.py
connect          AdamW is served by the fused step, other optimizers by FP32 masters    optimizer.py, bridge.py
forward          half products, FP32 sums and losses                                    numerics.py
pre_backward     the loss is FP32, and is scaled                                        loss_scale.py
optimizer_step   one look at the gradients, then unscale, clip and update in one pass   kernels/
teardown         the module is FP32 again, and everything global is what it was
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Adam, AdamW, Optimizer, SparseAdam
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from .bridge import BridgedOptimizer, bridge
from .conversion import ConvertedModule, module_types
from .diagnosis import Watch
from .loss_scale import ConstantLossScale, DynamicLossScale, make_loss_scale
from .masters import MasterWeights
from .numerics import FP32Losses, default_dtype, fp32_sums
from .optimizer import MasterAdamW
from .release import GradientRelease, check_loop
from .replicas import share_masters
from .schedules import HeldSchedules
from .shards import any_sharded
from .skips import SkippedSteps
from .storage import master_storage, moment_storage

DTYPES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
OWN_MASTERS = ("DeepSpeedStrategy",)
"""Strategies that do what this plugin does. Lightning's FSDPStrategy refuses every precision plugin but its own."""


class MasterWeightPrecision(Precision):
    """Train in half precision with FP32 master weights: `Trainer(plugins=[MasterWeightPrecision("16-true")])`.

    The pipeline of *Mixed Precision Training* (Micikevicius et al., ICLR 2018, arXiv 1710.03740). During `fit` the
    module's parameters, buffers, activations and gradients are half; each parameter has an FP32 master that the
    optimizer updates; the loss is scaled; a step with a gradient that is inf or NaN changes nothing. Seen from outside
    all is FP32: `state_dict`, checkpoints, and the module after `fit`. `validate`, `test` and `predict` run in half.

    Args:
        precision: `"16-true"` (float16) or `"bf16-true"` (bfloat16).
        loss_scale: `"auto"` (dynamic for float16, none for bfloat16), `"dynamic"`, a positive number (constant), a
            `DynamicLossScale`, a `ConstantLossScale`, or None.
        master_weights: `"split"`: 2 bytes beside each half weight, exact; `"float32"`: 4 bytes; `"split8"`: 1 byte,
            which keeps 24 bits of the master.
        optimizer_state: how AdamW's moments are stored: `"float32"`: 8 bytes for both; `"bfloat16"`: 4; `"8bit"`:
            2.06. The last two are lossy, and right on average.
        gradient_release: update each parameter within backward and free its gradient at once: gradients then take
            next to nothing. A parameter whose gradient is not finite is skipped alone, and the step counted. For one
            AdamW or Adam under automatic optimization, and not with a dynamic loss scale, clipping by norm, or
            accumulation over batches, which all need every gradient first; `on_before_optimizer_step` sees none.
        fp32_modules: module types kept in FP32 with their inputs and outputs cast; None for norms with running
            statistics (BatchNorm, InstanceNorm), which need no cast; `()` for none at all.
        autocast: run forward under `torch.autocast` as well, for modules that mix types. Autocast makes some outputs,
            of norms and softmax among them, FP32: activations are larger.

    Attributes:
        warn_after_skips: this many skipped steps in a row, with a scale that can fall no further, give a warning.
        error_after_skips: and this many an error. None for neither.

    Raises:
        ValueError: an argument is not one of these; the message names it.
    """

    warn_after_skips: int | None = 25
    error_after_skips: int | None = 100

    def __init__(
        self,
        precision: Literal["16-true", "bf16-true"] = "16-true",
        *,
        loss_scale: str | float | DynamicLossScale | ConstantLossScale | None = "auto",
        master_weights: str = "split",
        optimizer_state: str = "float32",
        gradient_release: bool = False,
        fp32_modules: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
        autocast: bool = False,
    ) -> None:
        if not isinstance(precision, str) or precision not in DTYPES:
            raise ValueError(
                f"precision={precision!r} is not one of {', '.join(map(repr, DTYPES))}: MasterWeightPrecision trains "
                "in half precision; for anything else use Trainer(precision=...)."
            )
        self.precision = precision
        self._dtype = DTYPES[precision]
        self._loss_scale = make_loss_scale(loss_scale, self._dtype)
        if gradient_release and isinstance(self._loss_scale, DynamicLossScale):
            raise ValueError(
                f"gradient_release=True cannot be with loss_scale={loss_scale!r}, which is dynamic in {precision!r}: a "
                "scale that falls skips the whole step, and parts of it are done by then. Give a constant one, such "
                "as loss_scale=1024, or use 'bf16-true'."
            )
        self._gradient_release = gradient_release
        self._release: GradientRelease | None = None
        self._master_weights = master_storage(master_weights).name
        self._optimizer_state = moment_storage(optimizer_state).name
        self._fp32_modules = module_types(fp32_modules)
        self._autocast = autocast
        self._masters = MasterWeights()
        self._converted: ConvertedModule | None = None
        self._replicas: DistributedDataParallel | None = None
        self._adopted: list[MasterAdamW | BridgedOptimizer] = []
        self._schedules = HeldSchedules()
        self._skips = SkippedSteps(self.loss_scale, self._on_skip)
        self._metrics = _InTrainer(self)
        self._clips: dict[Optimizer, tuple[GradClipAlgorithmType, float]] = {}
        self._grad_norm: Tensor | None = None
        self._watch: Watch | None = None
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

    def master_params(self, optimizer: Optimizer | LightningOptimizer) -> list[Tensor]:
        """The FP32 master weights of an optimizer's parameters, in their order, during `fit`. Read only."""
        adopted = _unwrapped(optimizer)
        if not isinstance(adopted, MasterAdamW | BridgedOptimizer):
            raise ValueError(
                f"{type(adopted).__name__} has no master weights: ask during fit, with an optimizer of the Trainer's."
            )
        return adopted.master_params()

    def memory_categories(self) -> Generator[tuple[str, Tensor, Tensor], None, None]:
        """For the memory profiler: the FP32 values of all parameters, frozen ones among them."""
        for parameter, stored in self._masters:
            yield "master_weights", stored, parameter

    # -- setting up and tearing down ----------------------------------------------------------------------------

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        if self._converted is not None:
            raise RuntimeError(
                "This MasterWeightPrecision is in use by another Trainer, and keeps that one's masters: "
                "give every Trainer its own."
            )
        strategy = type(getattr(getattr(module, "_trainer", None), "strategy", None)).__name__
        if strategy in OWN_MASTERS:
            raise ValueError(
                f"{strategy} keeps FP32 masters and scales the loss by itself: use precision='16-mixed' or "
                "'bf16-mixed' with it, or this plugin with strategy='ddp' or ModelParallelStrategy (FSDP2)."
            )
        self._converted = ConvertedModule(module, self._dtype, self._masters, self._fp32_modules)
        if self._converted.was_half:
            count, first = len(self._converted.was_half), self._converted.was_half[0]
            rank_zero_warn(
                f"{count} parameters ({first} first) were half precision already: their FP32 masters start from the "
                "half values. Hand over the FP32 module to start from all its bits."
            )
        return module

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        assert self._converted is not None
        parameter = next(iter(self._converted.module.parameters()), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        self._device_type = device.type
        self._loss_scale.to(device)
        if isinstance(model, DistributedDataParallel):
            self._replicas = model
            share_masters(model, self._converted.parameters, self._masters)
        self._skips.begin(self.loss_scale)
        for optimizer in optimizers:
            self._refuse(optimizer)
        for optimizer in optimizers:
            if type(optimizer) in (Adam, AdamW):
                self._adopted.append(
                    MasterAdamW.adopt(optimizer, self._masters, self._master_weights, self._optimizer_state)
                )
            else:
                self._adopted.append(bridge(optimizer, self._masters))
        if optimizers and self._gradient_release:
            self._release = self._released(self._converted.module)
        if optimizers:
            self._attach(self._converted.module, lr_schedulers)
            self._watch = Watch(self._converted.module, self._dtype, rank_zero_warn)
            self._watch.start(self._adopted)
        return model, optimizers, lr_schedulers

    @override
    def teardown(self) -> None:
        """Undo all of the above. The Trainer calls this when it is done, also after an exception."""
        self._schedules.release()
        if self._release is not None:
            self._release.remove()
            self._release = None
        converted, self._converted = self._converted, None
        if converted is not None:
            # The bridge's parameters share the masters' memory, so optimizers let go before the module takes over.
            for adopted in self._adopted:
                adopted.release()
            converted.restore()
            trainer = getattr(converted.module, "_trainer", None)
            if trainer is not None and self._metrics in trainer.callbacks:
                trainer.callbacks.remove(self._metrics)
        self._adopted = []
        self._replicas = None
        self._clips.clear()
        watch, self._watch = self._watch, None
        self._skips.learn(wait=True)
        if watch is not None:
            watch.end()

    def _refuse(self, optimizer: Any) -> None:
        name = type(optimizer).__name__
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"{name} evaluates the loss many times within a step, which loss scaling cannot follow: "
                "use another optimizer, or Trainer(precision='32-true')."
            )
        if isinstance(optimizer, SparseAdam):
            raise ValueError(f"{name} takes sparse gradients, and the update takes dense ones only: use AdamW.")
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{name} is not a torch.optim.Optimizer; masters are kept for one's parameters: use one.")

    def _released(self, module: nn.Module) -> GradientRelease:
        if self._replicas is not None or any_sharded(list(module.parameters())):
            raise ValueError(
                "gradient_release=True cannot be with DistributedDataParallel or fully_shard: whether a gradient is "
                "finite is known only once it is reduced over the ranks. Leave it out, or train on one device."
            )
        if isinstance(module, pl.LightningModule):
            check_loop(
                automatic=module.automatic_optimization,
                accumulated=module.trainer.accumulate_grad_batches,
                clip_val=module.trainer.gradient_clip_val,
                algorithm=module.trainer.gradient_clip_algorithm,
            )
        return GradientRelease(self._adopted)

    def reload_masters(self, checkpoint: str | Path | None) -> None:
        """Where torch has loaded a file into half parameters alone, give the masters the FP32 values that it holds."""
        assert self._converted is not None
        if self._converted.loaded_in_half and checkpoint is not None and Path(checkpoint).is_file():
            file = torch.load(checkpoint, map_location="cpu", mmap=True, weights_only=True)
            self._converted.reload(file["state_dict"])
        if self._converted.loaded_in_half:
            rank_zero_warn(
                f"{len(self._converted.loaded_in_half)} parameters were loaded in half precision: their masters start "
                "from the half values. Load a checkpoint that was saved with save_distributed_checkpoint=True."
            )
            self._converted.loaded_in_half.clear()

    def _attach(self, module: nn.Module, lr_schedulers: list[Any]) -> None:
        """Metrics, and schedules that wait for skipped steps: what needs the module's Trainer."""
        if not isinstance(module, pl.LightningModule):
            return
        module.trainer.callbacks.append(self._metrics)  # type: ignore[attr-defined]
        if module.automatic_optimization and self._release is None:  # there, the rest of a step is done
            for config in lr_schedulers:
                if config.interval == "step" and not isinstance(config.scheduler, ReduceLROnPlateau):
                    self._schedules.hold(config.scheduler, config.frequency)

    # -- forward ------------------------------------------------------------------------------------------------

    @override
    def convert_input(self, data: Any) -> Any:
        """Floating tensors of a batch become half."""
        return apply_to_collection(data, Tensor, lambda t: t.to(self._dtype) if t.is_floating_point() else t)

    @override
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

    # -- backward -----------------------------------------------------------------------------------------------

    @override
    def pre_backward(self, tensor: Tensor, module: "pl.LightningModule") -> Tensor:  # type: ignore[override]
        assert self._converted is not None
        if self._replicas is not None and self._replicas.require_backward_grad_sync:
            self._converted.narrow_gradients()
        else:
            self._converted.widen_gradients()
        if self._watch is not None:
            self._watch.loss = tensor.detach()
        # FP32 first: a scale of 2**16 is inf in float16.
        return super().pre_backward(tensor.float() * self._loss_scale.scale, module)

    @override
    def backward(self, tensor: Tensor, model: "pl.LightningModule", *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        released: AbstractContextManager[None] = nullcontext()
        if self._release is not None:
            check_loop(accumulated=model.trainer.accumulate_grad_batches)  # a callback may have changed it
            released = self._release.running(self._loss_scale.scale, model.trainer.gradient_clip_val)
        # Checkpointed modules run forward again here.
        with self.forward_context(), released:
            super().backward(tensor, model, *args, **kwargs)

    # -- the step -----------------------------------------------------------------------------------------------

    @override
    def clip_gradients(
        self,
        optimizer: Optimizer,
        clip_val: int | float = 0.0,
        gradient_clip_algorithm: GradClipAlgorithmType = GradClipAlgorithmType.NORM,
    ) -> None:
        """Note how the gradients are to be clipped; the update does it, on true gradients, in the same pass."""
        if self._release is not None:
            self._release.check_clipping(clip_val, GradClipAlgorithmType(gradient_clip_algorithm).value)
        elif clip_val > 0:
            self._clips[_unwrapped(optimizer)] = (GradClipAlgorithmType(gradient_clip_algorithm), float(clip_val))

    @override
    def optimizer_step(  # type: ignore[override]
        self,
        optimizer: MasterAdamW | BridgedOptimizer,
        model: "pl.LightningModule",
        closure: Callable[[], Any],
        **kwargs: Any,
    ) -> Any:
        result = closure()
        self._after_closure(model, optimizer)
        clip = self._clips.pop(optimizer, None)
        if result is None and model.automatic_optimization:
            return result  # training_step returned None: there is nothing to learn from
        by_norm = clip is not None and clip[0] == GradClipAlgorithmType.NORM
        if self._release is not None:
            found_inf, norm = self._release.found_inf(), None
        else:
            found_inf, norm = optimizer.scan_gradients(norm=by_norm)
        divisor = scale = self._loss_scale.scale
        self._grad_norm = None
        if clip is not None and norm is not None:
            self._grad_norm = norm / scale
            # As torch.nn.utils.clip_grad_norm_: min(1, clip / (norm + 1e-6)), folded into the division by the scale.
            divisor = scale * ((self._grad_norm + 1e-6) / clip[1]).clamp(min=1.0)
        optimizer.grad_scale, optimizer.found_inf = divisor, found_inf
        optimizer.clip_value = clip[1] if clip is not None and not by_norm else None
        try:
            optimizer.step(**kwargs)
        finally:
            del optimizer.grad_scale, optimizer.found_inf, optimizer.clip_value
        at_minimum = self._loss_scale.at_minimum
        self._loss_scale.update(found_inf)
        self._skips.record(found_inf, at_minimum, self._loss_scale.scale, optimizer)
        self._skips.learn()
        if self._watch is not None:
            released = None if self._release is None else self._release.found
            self._watch.check(self._skips, self.warn_after_skips, self.error_after_skips, released)
        return result

    def _on_skip(self, optimizer: Optimizer) -> None:
        self._schedules.skipped(optimizer)
        if self._watch is not None:
            self._watch.skipped(self._skips.in_a_row)

    # -- the plugin's own state ---------------------------------------------------------------------------------

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "loss_scale": self._loss_scale.state_dict(),
            "skipped_steps": self.skipped_steps,
            "held_schedules": self._schedules.state_dict(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        missing = [name for name in ("loss_scale", "skipped_steps") if name not in state_dict]
        if missing:
            raise ValueError(
                f"The checkpoint's entry {type(self).__name__!r} has {sorted(state_dict)} and lacks {missing}: without "
                "the entry, training goes on with a new loss scale."
            )
        self._loss_scale.load_state_dict(state_dict["loss_scale"])
        self._skips.total, self._skips.scale = state_dict["skipped_steps"], self.loss_scale
        self._schedules.load_state_dict(state_dict.get("held_schedules", ()))

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the loss scale of a file that `16-mixed` saved."""
        if scaler := checkpoint.get("MixedPrecision"):
            self._loss_scale.load_state_dict({"scale": scaler["scale"], "growth_tracker": scaler["_growth_tracker"]})
            self._skips.scale = self.loss_scale


class _InTrainer(Callback):
    """What must be done between the Trainer's own doings.

    `mpt/loss_scale` and `mpt/skipped_steps` go to its logger and its progress bar.
    """

    def __init__(self, plugin: MasterWeightPrecision) -> None:
        self._plugin = plugin

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._plugin.reload_masters(trainer.ckpt_path)

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        # What the host knows by now, as tensors on the CPU: logging them waits for nothing.
        skips = self._plugin._skips
        for name, value in (("mpt/loss_scale", skips.scale), ("mpt/skipped_steps", skips.total)):
            pl_module.log(name, torch.tensor(float(value)), on_step=True, on_epoch=False, prog_bar=True)


def _unwrapped(optimizer: Optimizer | LightningOptimizer) -> Optimizer:
    return optimizer.optimizer if isinstance(optimizer, LightningOptimizer) else optimizer
