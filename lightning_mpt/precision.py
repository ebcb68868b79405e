"""The Trainer plugin: when what happens. What Fabric needs too is in `pipeline.py`, the parts are in the other modules.

convert_module   the module becomes half
connect          its optimizers step FP32 masters, and its schedules wait for skipped steps
pre_backward     the loss is scaled
optimizer_step   unscale, clip and update, or skip
teardown         the module is FP32 again, and everything global is what it was
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from typing_extensions import override

from .base import Scan
from .bridge import BridgedOptimizer
from .loss_scale import ConstantLossScale, DynamicLossScale
from .optimizer import MasterAdamW
from .pipeline import Clip, MasterWeightPipeline, refuse_optimizer, unwrapped
from .release import GradientRelease, check_loop
from .skips import SkippedSteps


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
        if gradient_release and isinstance(self._loss_scale, DynamicLossScale):
            raise ValueError(
                f"gradient_release=True cannot be with loss_scale={loss_scale!r}, which is dynamic in {precision!r}: a "
                "scale that falls skips the whole step, and parts of it are done by then. Give a constant one, such "
                "as loss_scale=1024, or use 'bf16-true'."
            )
        self._gradient_release = gradient_release
        self._release: GradientRelease | None = None
        self._metrics = _LogMetrics(self._skips)

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        if self._converted:
            raise RuntimeError(
                "This MasterWeightPrecision is in use by another Trainer, and keeps that one's masters: "
                "give every Trainer its own."
            )
        self._convert(module)
        return module

    @override
    def connect(
        self, model: nn.Module, optimizers: list[Optimizer], lr_schedulers: list[Any]
    ) -> tuple[nn.Module, list[Optimizer], list[Any]]:
        (converted,) = self._converted
        parameter = next(iter(converted.module.parameters()), None)
        self._train_on(torch.device("cpu") if parameter is None else parameter.device)
        for optimizer in optimizers:
            refuse_optimizer(optimizer)
        for optimizer in optimizers:
            self._adopt(optimizer)
        if optimizers and self._gradient_release:
            self._release = self._released(converted.module)
        if optimizers:
            self._attach(converted.module, lr_schedulers)
        return model, optimizers, lr_schedulers

    @override
    def teardown(self) -> None:
        """Undo all of the above. The Trainer calls this when it is done, also after an exception."""
        if self._release is not None:
            self._release.remove()
            self._release = None
        for converted in self._converted:
            trainer = getattr(converted.module, "_trainer", None)
            if trainer is not None and self._metrics in trainer.callbacks:
                trainer.callbacks.remove(self._metrics)
        self._let_go()

    def _released(self, module: nn.Module) -> GradientRelease:
        if isinstance(module, pl.LightningModule):
            check_loop(
                automatic=module.automatic_optimization,
                accumulated=module.trainer.accumulate_grad_batches,
                clip_val=module.trainer.gradient_clip_val,
                algorithm=module.trainer.gradient_clip_algorithm,
            )
        return GradientRelease(self._adopted)

    def _attach(self, module: nn.Module, lr_schedulers: list[Any]) -> None:
        """Metrics, and schedules that wait for skipped steps: what needs the module's Trainer."""
        if not isinstance(module, pl.LightningModule):
            return
        module.trainer.callbacks.append(self._metrics)  # type: ignore[attr-defined]
        if module.automatic_optimization and self._release is None:  # there, the rest of a step is done
            for config in lr_schedulers:
                if config.interval == "step" and not isinstance(config.scheduler, ReduceLROnPlateau):
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
        with self.forward_context(), released:
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
        result = closure()
        self._after_closure(model, optimizer)
        clip = self._clips.pop(optimizer, None)
        if result is None and model.automatic_optimization:
            return result  # training_step returned None: there is nothing to learn from
        scan = None if self._release is None else Scan(self._release.found_inf(), None)
        self._update(optimizer, clip, scan, closure=lambda: result, **kwargs)
        return result


class _LogMetrics(Callback):
    """`mpt/loss_scale` and `mpt/skipped_steps`, to the Trainer's logger and its progress bar."""

    def __init__(self, skips: SkippedSteps) -> None:
        self._skips = skips

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        # What the host knows by now, as tensors on the CPU: logging them waits for nothing.
        for name, value in (("mpt/loss_scale", self._skips.scale), ("mpt/skipped_steps", self._skips.total)):
            # Lightning asks for the batch size in a `training_step(dataloader_iter)`, though there is no mean to take.
            pl_module.log(name, torch.tensor(float(value)), on_step=True, on_epoch=False, prog_bar=True, batch_size=1)
