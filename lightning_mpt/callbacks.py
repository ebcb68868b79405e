"""What the plugin does by way of the Trainer's callbacks: its metrics, whole files, averages of the FP32 masters."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from typing_extensions import override

from .skips import SkippedSteps


class LogMetrics(Callback):
    """`mpt/loss_scale` and `mpt/skipped_steps`, to the Trainer's logger and its progress bar."""

    def __init__(self, skips: SkippedSteps) -> None:
        self._skips = skips

    @override
    def on_train_batch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", *_: Any) -> None:
        # What the host knows by now, as tensors on the CPU: logging them waits for nothing.
        for name, value in (("mpt/loss_scale", self._skips.scale), ("mpt/skipped_steps", self._skips.total)):
            # Lightning asks for the batch size in a `training_step(dataloader_iter)`, though there is no mean to take.
            pl_module.log(name, torch.tensor(float(value)), on_step=True, on_epoch=False, prog_bar=True, batch_size=1)


def name_file(error: BaseException, file: Any) -> None:
    """Say below an error's message, from Python 3.11 on, which file was being loaded, if any was."""
    if file is not None and hasattr(error, "add_note"):
        error.add_note(f"That is of the checkpoint {file}, from which training was to go on.")


class ReloadMasters(Callback):
    """Once the Trainer has loaded a file, `reload` is told which. An error until then names the file.

    First of all callbacks, so that the others find the masters whole, and what they write to them stays.
    """

    def __init__(self, reload: Callable[[Any], None]) -> None:
        self._reload = reload
        self._loaded = False

    def attach(self, callbacks: list[Callback]) -> None:
        """Join the Trainer's callbacks, before it loads what the optimizers were."""
        self._loaded = False
        callbacks.insert(0, self)

    @override
    def on_sanity_check_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self.on_train_start(trainer, pl_module)

    @override
    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._loaded = True
        self._reload(trainer.ckpt_path)

    @override
    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        if not self._loaded:
            name_file(exception, trainer.ckpt_path)


class AveragedMasters:
    """Makes Lightning's callbacks that average weights see FP32 masters where the module has half weights.

    They read the module's parameters to add to the average, and write to them to exchange the two. Where they do,
    the module is given FP32 values, and nowhere else. The methods are wrapped on the callback object, until `release`.
    """

    def __init__(self) -> None:
        self._wrapped: list[tuple[Any, str]] = []

    def attach(self, callbacks: Sequence[Callback], fp32_values: Callable[..., AbstractContextManager[None]]) -> None:
        """Wrap what the averaging ones among `callbacks` do to the module in `fp32_values(write=...)`."""
        reads, writes = partial(fp32_values, write=False), partial(fp32_values, write=True)
        for callback in callbacks:
            if isinstance(callback, StochasticWeightAveraging):
                self._wrap(callback, "update_parameters", reads)
                self._wrap(callback, "transfer_weights", writes)
            elif isinstance(callback, WeightAveraging) and callback._average_model is not None:
                self._wrap(callback._average_model, "update_parameters", reads)
                self._wrap(callback, "_swap_models", writes)
                self._wrap(callback, "_copy_average_to_current", writes)

    def release(self) -> None:
        """Give every callback its own methods again."""
        for owner, name in self._wrapped:
            delattr(owner, name)
        self._wrapped.clear()

    def _wrap(self, owner: Any, name: str, context: Callable[[], AbstractContextManager[None]]) -> None:
        method = getattr(owner, name)

        def within(*args: Any, **kwargs: Any) -> Any:
            with context():
                return method(*args, **kwargs)

        setattr(owner, name, within)
        self._wrapped.append((owner, name))
