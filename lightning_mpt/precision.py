"""The Trainer plugin: when what happens. What Fabric needs too is in `pipeline.py`, the parts are in the other modules.

convert_module   the module becomes half
connect          its optimizers step FP32 masters, and its schedules wait for skipped steps
pre_backward     the loss is scaled
optimizer_step   unscale, clip and update, or skip
teardown         the module is FP32 again, and everything global is what it was
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities import GradClipAlgorithmType
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from .arguments import flag
from .base import Scan, unwrapped
from .bridge import BridgedOptimizer, refuse_unfit
from .callbacks import AveragedMasters, LogMetrics, ReloadMasters, name_file
from .conversion import ConvertedModule
from .loss_scale import ConstantLossScale, DynamicLossScale
from .numerics import default_dtype
from .optimizer import MasterAdamW
from .pipeline import Clip, MasterWeightPipeline
from .release import GradientRelease, check_loop
from .shards import any_sharded
from .true_gradients import true_gradients

OWN_MASTERS = ("DeepSpeedStrategy",)
"""Strategies that do what this plugin does. Lightning's FSDPStrategy refuses every precision plugin but its own."""


class MasterWeightPrecision(MasterWeightPipeline, Precision):
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

    def __init__(
        self,
        precision: Literal["16-true", "bf16-true"] = "16-true",
        *,
        # A number first: jsonargparse takes the first type that fits what a command line says.
        loss_scale: float | str | DynamicLossScale | ConstantLossScale | None = "auto",
        master_weights: str = "split",
        optimizer_state: str = "float32",
        gradient_release: bool = False,
        fp32_modules: type[nn.Module] | Sequence[type[nn.Module]] | None = None,
        autocast: bool = False,
    ) -> None:
        super().__init__(precision, loss_scale, master_weights, optimizer_state, fp32_modules, autocast)
        if flag("gradient_release", gradient_release) and isinstance(self._loss_scale, DynamicLossScale):
            raise ValueError(
                f"gradient_release=True cannot be with loss_scale={loss_scale!r}, which is dynamic in {precision!r}: a "
                "scale that falls skips the whole step, and parts of it are done by then. Give a constant one, such "
                "as loss_scale=1024, or use 'bf16-true'."
            )
        self._gradient_release = gradient_release
        self._release: GradientRelease | None = None
        self._reloads, self._metrics = ReloadMasters(self._reload_masters), LogMetrics(self._skips)
        self._averages = AveragedMasters()
        self._saves: Strategy | None = None
        self._shows_true_gradients = False
        self._old_gradients_wanted = True

    @contextmanager
    def true_gradients(self) -> Generator[None, None, None]:
        """Within it, `parameter.grad` of the module's parameters is the true gradient: float32, unscaled.

        So it is for callbacks and the module in `on_before_optimizer_step` and `configure_gradient_clipping`, with
        `lightning.pytorch.utilities.grad_norm` among others; elsewhere between backward and the step, in manual
        optimization above all, ask for it: `with self.trainer.precision_plugin.true_gradients(): ...`. What is
        changed in place or assigned holds for the step. A gradient that is looked at takes 4 bytes an element until
        the end of the block, and keeps them if it was changed; one that nobody looks at costs nothing.

        Raises:
            RuntimeError: no module is being trained, or a gradient that is looked at is sparse.
        """
        if not self._converted:
            raise RuntimeError(f"{self!r} trains no module now, and knows no gradients: ask during fit.")
        if self._shows_true_gradients:
            yield
            return
        (converted,) = self._converted
        self._shows_true_gradients = True
        try:
            with true_gradients(converted, self._gradients_scale, scaled=self._scaled_loss) as assigned:
                yield
            self._went_backward |= bool(assigned)
        finally:
            self._shows_true_gradients = False

    @contextmanager
    def fp32_values(self) -> Generator[None, None, None]:
        """Within it, the module that is trained has FP32 parameters and buffers, other tensors, only to be read.

        For what looks at types beside `state_dict`, as an export does: `with plugin.fp32_values():
        self.model.save_pretrained(path)`. It takes 4 bytes a parameter on the device until the end of the block.
        """
        with ExitStack() as stack:
            for converted in self._converted:
                stack.enter_context(converted.fp32_values(write=False))
            yield

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        if self._converted:
            raise RuntimeError(
                "This MasterWeightPrecision is in use by another Trainer, and keeps that one's masters: "
                "give every Trainer its own."
            )
        trainer = getattr(module, "_trainer", None)
        if trainer is None:
            raise TypeError(
                f"{type(self).__name__} is for the Trainer, and {type(module).__name__} comes without one: in Fabric "
                f"use FabricMasterWeightPrecision({self.precision!r})."
            )
        strategy = type(trainer.strategy)
        if any(kind.__name__ in OWN_MASTERS for kind in strategy.__mro__):
            raise ValueError(
                f"{strategy.__name__} keeps FP32 masters and scales the loss by itself: use precision='16-mixed' or "
                "'bf16-mixed' with it, or this plugin with strategy='ddp' or ModelParallelStrategy (FSDP2)."
            )
        try:
            self._convert(module)
        except ValueError as error:
            name_file(error, trainer.ckpt_path)
            raise
        self._say_dtype(module, self._dtype)
        return module

    def _say_dtype(self, module: nn.Module, dtype: torch.dtype) -> None:
        """What `self.dtype` of a LightningModule says."""
        for part in module.modules():
            if isinstance(part, pl.LightningModule):
                part._dtype = dtype

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        (converted,) = self._converted
        parameter = next(iter(converted.module.parameters()), None)
        self._train_on(torch.device("cpu") if parameter is None else parameter.device)
        self._join(model)
        self._take(optimizers)
        if optimizers:
            self._watch_over(converted.module)
        self._attach(converted.module, lr_schedulers)
        return model, optimizers, lr_schedulers

    @override
    def teardown(self) -> None:
        """Undo all of the above. The Trainer calls this when it is done, also after an exception."""
        self._averages.release()
        if self._saves is not None:
            self._saves.__dict__.pop("save_checkpoint", None)
            self._saves = None
        if self._release is not None:
            self._release.remove()
            self._release = None
        for converted in self._converted:
            self._say_dtype(converted.module, torch.float32)
            trainer = getattr(converted.module, "_trainer", None)
            if trainer is not None:
                trainer.callbacks[:] = [one for one in trainer.callbacks if one not in (self._reloads, self._metrics)]
        self._let_go()

    def _take(self, optimizers: list[Optimizer]) -> None:
        """From now on these optimizers, and no others, step the module's masters."""
        (converted,) = self._converted
        for optimizer in optimizers:
            refuse_unfit(optimizer)
        for gone in [one for one in self._adopted if one not in optimizers]:
            self._adopted.remove(gone)
            gone.release()
        for optimizer in optimizers:
            if optimizer not in self._adopted:
                self._adopt(optimizer)
        if self._release is not None:
            self._release.remove()
        self._release = self._released(converted.module) if optimizers and self._gradient_release else None

    def _released(self, module: nn.Module) -> GradientRelease:
        if self._replicas or any_sharded(list(module.parameters())):
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
        return GradientRelease(self._adopted, {parameter: name for name, parameter in module.named_parameters()})

    def _reload_masters(self, checkpoint: str | Path | None) -> None:
        (converted,) = self._converted
        self._reload(converted, checkpoint, "state_dict")

    def _attach(self, module: nn.Module, lr_schedulers: list[Any]) -> None:
        """Averages over masters, metrics, schedules that wait for skipped steps: what needs the module's Trainer."""
        if not isinstance(module, pl.LightningModule):
            return
        (converted,) = self._converted
        callbacks: list[pl.Callback] = module.trainer.callbacks  # type: ignore[attr-defined]
        self._averages.attach(callbacks, converted.fp32_values)
        if self._adopted:
            self._save_in_fp32(module.trainer.strategy, converted)
            self._reloads.attach(callbacks)
            if not module.trainer.barebones:  # nothing is logged there
                callbacks.append(self._metrics)
        self._old_gradients_wanted = _wants_old_gradients(module, callbacks)
        self._hold(module, lr_schedulers)

    def _save_in_fp32(self, strategy: Strategy, converted: ConvertedModule) -> None:
        """What the module's `on_save_checkpoint` has collected from its parameters is FP32 in the file too."""
        save = strategy.save_checkpoint

        def save_checkpoint(checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            converted.values.widen(checkpoint.get("state_dict"))
            save(checkpoint, *args, **kwargs)

        strategy.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
        self._saves = strategy

    def _hold(self, module: pl.LightningModule, lr_schedulers: list[Any]) -> None:
        """Schedules that the Trainer steps wait for skipped steps."""
        if module.automatic_optimization and self._release is None:  # there, the rest of a step is done
            for config in lr_schedulers:
                if config.interval == "step":
                    self._schedules.hold(config.scheduler, config.frequency)

    @override
    def pre_backward(self, tensor: Tensor, module: "pl.LightningModule") -> Tensor:  # type: ignore[override]
        return super().pre_backward(self._scaled(tensor), module)

    @override
    def backward(self, tensor: Tensor, model: "pl.LightningModule", *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        released: AbstractContextManager[None] = nullcontext()
        if self._release is not None:
            check_loop(accumulated=model.trainer.accumulate_grad_batches)  # a callback may have changed it
            released = self._release.running(self._gradients_scale, model.trainer.gradient_clip_val)
        # Checkpointed modules run forward again here.
        with self._half_numerics(), released:
            super().backward(tensor, model, *args, **kwargs)

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
            by_norm = GradClipAlgorithmType(gradient_clip_algorithm) == GradClipAlgorithmType.NORM
            self._clips[unwrapped(optimizer)] = Clip(float(clip_val), by_norm)

    @override
    def optimizer_step(  # type: ignore[override]
        self,
        optimizer: MasterAdamW | BridgedOptimizer,
        model: "pl.LightningModule",
        closure: Callable[[], Any],
        **kwargs: Any,
    ) -> Any:
        if optimizer not in self._adopted:  # the Trainer was given others in mid-run, by `strategy.setup_optimizers`
            self._take(model.trainer.optimizers)
            self._hold(model, model.trainer.lr_scheduler_configs)
        # The Trainer's own closure is forward and backward. A user may have called it by now, and give another.
        both_to_come = isinstance(closure, Closure)
        if both_to_come and not self._old_gradients_wanted and model.trainer.accumulate_grad_batches == 1:
            # The closure lets them go after forward. Where forward ends in the step's peak, they would be part of it.
            for parameter in optimizer.parameters():
                parameter.grad = None
        result = closure()
        with default_dtype(torch.float32):  # in manual optimization this is within the training step, and half
            with self.true_gradients():
                self._after_closure(model, optimizer)
            clip = self._clips.pop(optimizer, None)
            if result is None and model.automatic_optimization and not self._has_gradients(optimizer):
                # training_step returned None: nothing to learn from
                optimizer._opt_called = True  # schedules go on, and would warn that no step came before theirs
            else:
                scan, released = None, None
                if self._release is not None:
                    scan, released = Scan(self._release.found_inf(), None), self._release.found
                    self._release.found = {}
                self._update(optimizer, clip, scan, released, closure=lambda: result, **kwargs)
        return result

    def _has_gradients(self, optimizer: MasterAdamW | BridgedOptimizer) -> bool:
        """Whether there was a backward since the last step."""
        if self._release is not None:
            return len(self._release.found) > 0
        return any(parameter.grad is not None for parameter in optimizer.parameters())

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over the loss scale of a file that `16-mixed` saved."""
        if scaler := checkpoint.get("MixedPrecision"):
            self._load_scale({"scale": scaler["scale"], "growth_tracker": scaler["_growth_tracker"]})


def _wants_old_gradients(module: pl.LightningModule, callbacks: Sequence[pl.Callback]) -> bool:
    """Whether the loop is the user's, or a hook sees the last step's gradients between forward and backward."""
    return (
        not module.automatic_optimization
        or is_overridden("on_before_zero_grad", module)
        or is_overridden("optimizer_zero_grad", module)
        or any(is_overridden("on_before_zero_grad", callback, pl.Callback) for callback in callbacks)
    )
