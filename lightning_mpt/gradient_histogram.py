"""See the underflow: a callback that counts the exponents of gradients while a network trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from .exponents import FP16_LOWEST, LOWEST, ExponentCounter, ExponentHistogram
from .gradient_tables import print_histograms, write_histogram_plot

_BELOW = FP16_LOWEST - LOWEST + 1
"""Bins before this are below fp16's range; the first of them is zero."""


class GradientHistogram(Callback):
    """How small gradients are: `Trainer(callbacks=[GradientHistogram()])` prints it when training ends.

    True gradients are counted, whatever the precision: of the loss as it is, not scaled. By module: how many are zero,
    below fp16's smallest number (2**-24), in its range; then what scaling by powers of two would save and lose, and the
    constant loss scale that fits. In a run in fp16, what was flushed to zero on the way is zero: to see what fp16 would
    lose, look at a run in FP32 or bf16.

    It changes nothing of the training, and waits for the device only when it is read. A sampled step costs a pass over
    its gradients, and under `MasterWeightPrecision` their FP32 copies until the step. Where ranks hold shards (FSDP2),
    a rank counts its own.

    While training, the Trainer's loggers get `gradients/zero` and `gradients/below_fp16`, shares of the weights'
    gradients in the last sample, and `gradients/largest`, the largest magnitude of any so far.

    Args:
        every_n_steps: of the optimizer; the first step is sampled.
        activations: count the gradients of what the innermost modules put out, too. They are as many as the
            activations, and smaller, as the mean over a batch is shared out among its elements.
        head_room: `constant_scale` leaves a gradient room to become this many times larger than any that was seen.
        plot: a .png, .svg or .pdf to draw into when training ends. Needs matplotlib: `lightning-mpt[plots]`.
        console: where to print; None for the terminal.

    Raises:
        ValueError: a number is outside its range; the message names it.
    """

    def __init__(
        self,
        every_n_steps: int = 10,
        *,
        activations: bool = False,
        head_room: float = 4.0,
        plot: str | Path | None = None,
        console: Console | None = None,
    ) -> None:
        if not isinstance(every_n_steps, int) or isinstance(every_n_steps, bool) or every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps!r} must be a whole number of at least 1, such as 10.")
        if not isinstance(head_room, int | float) or not 1 <= head_room < float("inf"):
            raise ValueError(f"head_room={head_room!r} must be a finite number of at least 1, such as 4.0.")
        self._every_n_steps = every_n_steps
        self._activations = activations
        self._head_room = head_room
        self._plot = plot
        self._console = console
        self._counters: dict[str, dict[str, ExponentCounter]] = {}
        self._handles: list[RemovableHandle] = []
        self._step = 0
        self._sampling = False
        self._sampled: int | None = None
        """Which stretch of `every_n_steps` steps has had its sample."""
        self._last_counts: Tensor | None = None
        self._logged: dict[str, Tensor] = {}

    # -- what a user may ask; on CUDA it waits for the device ------------------------------------------------------

    @property
    def weights(self) -> dict[str, ExponentHistogram]:
        """The gradients of the parameters, by the path of the module that has them (`""` is the root)."""
        return self._read("weights")

    @property
    def activations(self) -> dict[str, ExponentHistogram]:
        """The gradients of what modules put out, by their path, where that was asked for."""
        return self._read("activations")

    @property
    def constant_scale(self) -> float | None:
        """The constant loss scale that it would choose: the largest power of two that keeps every gradient seen,
        times the head-room, below fp16's 65504. None where none was seen that is not zero."""
        every = [*self.weights.values(), *self.activations.values()]
        return ExponentHistogram.sum(every).constant_scale(self._head_room)

    def _read(self, kind: str) -> dict[str, ExponentHistogram]:
        return {path: counter.read() for path, counter in self._counters.get(kind, {}).items()}

    # -- counting --------------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if getattr(trainer.precision_plugin, "_gradient_release", False):
            raise ValueError(
                "GradientHistogram looks at gradients before the step, and gradient_release=True frees each within "
                "backward: leave one of them out. To see the same gradients, train a few steps without it."
            )
        self._counters = {"weights": {}, "activations": {}}
        self._sampled, self._last_counts, self._logged = None, None, {}

    @override
    def on_train_batch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        # Until a step is taken: all micro-batches of it are looked at, and all optimizers that step in one batch.
        self._step = trainer.global_step
        self._sampling = self._step // self._every_n_steps != self._sampled
        if self._sampling and self._activations:
            self._watch_activations(trainer, pl_module)

    @override
    def on_before_optimizer_step(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", optimizer: Optimizer
    ) -> None:
        if not self._sampling:
            return
        scale = step_scale(trainer, optimizer)
        stepped = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in pl_module.named_parameters():
            if parameter in stepped and parameter.grad is not None:
                self._count("weights", name.rpartition(".")[0], parameter.grad, scale)

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        self._forget_activations()
        if self._sampling and trainer.global_step > self._step:
            self._sampled = self._step // self._every_n_steps
            self._note_sample()
        if trainer.loggers:
            for name, value in self._logged.items():
                pl_module.log(name, value, on_step=True, on_epoch=False, batch_size=1)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        self._forget_activations()

    @override
    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        if trainer.is_global_zero:
            kinds = {"weights": self.weights, "activations": self.activations}
            kinds = {kind: modules for kind, modules in kinds.items() if modules}
            print_histograms(kinds, self.constant_scale, self._head_room, self._console or Console())
            if self._plot is not None:
                write_histogram_plot(kinds, self.constant_scale, self._plot)

    def _count(self, kind: str, path: str, gradient: Tensor, scale: Tensor | None = None) -> None:
        counters = self._counters[kind]
        if path not in counters:
            counters[path] = ExponentCounter(gradient.device)
        counters[path].add(gradient, scale)

    def _watch_activations(self, trainer: "pl.Trainer", module: nn.Module) -> None:
        """Until the batch ends, count the gradient of every floating output of modules that have none inside."""

        def watch(path: str) -> Callable[[nn.Module, Any, Any], None]:
            def count(gradient: Tensor) -> None:
                self._count("activations", path, gradient, backward_scale(trainer))

            def seen(module: nn.Module, inputs: Any, outputs: Any) -> None:
                for output in outputs if isinstance(outputs, tuple | list) else (outputs,):
                    if isinstance(output, Tensor) and output.requires_grad:
                        self._handles.append(output.register_hook(count))

            return seen

        for path, part in module.named_modules():
            if next(part.children(), None) is None:
                self._handles.append(part.register_forward_hook(watch(path)))

    def _forget_activations(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note_sample(self) -> None:
        """What to log of the sample, as tensors on the device."""
        counters = list(self._counters["weights"].values())
        if not counters:
            return
        device = counters[0].counts.device
        total = torch.stack([counter.counts.to(device, non_blocking=True) for counter in counters]).sum(dim=0)
        sample = total if self._last_counts is None else total - self._last_counts
        self._last_counts = total
        number = sample.sum().clamp(min=1).float()
        largest = [counter.largest.to(device, non_blocking=True) for counter in counters]
        self._logged = {
            "gradients/zero": sample[0] / number,
            "gradients/below_fp16": sample[1:_BELOW].sum() / number,
            "gradients/largest": torch.stack(largest).amax(),
        }


def backward_scale(trainer: "pl.Trainer") -> Tensor | None:
    """What gradients are multiplied by within backward: float32 without dimensions, on the device; None for 1."""
    scaler = _grad_scaler(trainer)
    ours: Tensor | None = getattr(trainer.precision_plugin, "_gradients_scale", None)
    return ours if scaler is None else scaler._scale


def step_scale(trainer: "pl.Trainer", optimizer: Optimizer) -> Tensor | None:
    """And what before the step: nothing, as our gradients are unscaled as they are read, and `16-mixed` has unscaled
    its own, unless the optimizer does that itself (torch's fused ones)."""
    scaler = _grad_scaler(trainer)
    unscales = getattr(optimizer, "_step_supports_amp_scaling", False)
    return scaler._scale if scaler is not None and unscales else None


def _grad_scaler(trainer: "pl.Trainer") -> Any:
    """The `torch.amp.GradScaler` of `16-mixed`, or None. Its `get_scale()` would wait for the device."""
    return getattr(trainer.precision_plugin, "scaler", None)
