"""A run that was stopped and goes on is, bit for bit, the run that was not."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LinearLR
from training import Classifier, Configure, Resumable, classification, fit, loader, mlp, trainer

from lightning_mpt import PRESETS, DynamicLossScale, MasterWeightPrecision
from lightning_mpt.storage import MASTER_STORAGES, MOMENT_STORAGES

PRECISIONS = ("16-true", "bf16-true")
EPOCH = 6
SKIPPED = 1
"""The batch, of each epoch, whose loss is NaN."""
SAVED = {"step=4": 4, "step=6": 6, "epoch=0": 6}
"""Checkpoints, in the middle and at the end of an epoch, and how many batches came before them."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 12), nn.LayerNorm(12), nn.Linear(12, 4)
    )  # fmt: skip


def with_schedule(optimizer: Any, frequency: int = 1) -> Configure:
    def configure(module: L.LightningModule) -> Any:
        made = optimizer(module.parameters())
        schedule = LinearLR(made, 1.0, 0.1, total_iters=12)
        return {
            "optimizer": made,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "frequency": frequency},
        }

    return configure


def adamw(parameters: Any) -> Any:
    return torch.optim.AdamW(parameters, lr=1e-2)


def scale() -> DynamicLossScale:
    """One that overflows in float16 at first, counts when the first file is written, and grows after that."""
    return DynamicLossScale(init_scale=2.0**20, growth_interval=3)


def plugin(precision: Any, **options: Any) -> MasterWeightPrecision:
    return MasterWeightPrecision(precision, loss_scale=scale(), **options)


class Saves(Classifier):
    """Saves after some steps, before anything else of the batch is over, and at the ends of epochs."""

    def __init__(self, configure: Configure, folder: Path | None) -> None:
        super().__init__(net(), configure)
        self._folder = folder
        self.scales: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.scales.append(self.trainer.precision_plugin.loss_scale)  # type: ignore[attr-defined]
        return loss * float("nan") if batch_idx == SKIPPED else loss

    def on_train_batch_end(self, *_: Any) -> None:
        self._save("step", self.trainer.global_step)

    def on_train_epoch_end(self) -> None:
        self._save("epoch", self.trainer.current_epoch)

    def _save(self, what: str, number: int) -> None:
        if self._folder is not None and f"{what}={number}" in SAVED:
            self.trainer.save_checkpoint(self._folder / f"{what}={number}.ckpt")


class Manual(Saves):
    """Steps its two optimizers itself, one after the other."""

    def __init__(self, configure: Configure, folder: Path | None) -> None:
        super().__init__(configure, folder)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()


class Clamping(Saves):
    """Writes to its half weights before every forward, and changes some."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            for weight in self.net.parameters():
                weight.clamp_(-0.2, 0.2)
        return super().training_step(batch, batch_idx)


def run(
    ours: MasterWeightPrecision,
    configure: Configure,
    kind: type[Saves] = Saves,
    folder: Path | None = None,
    ckpt: Path | None = None,
) -> Any:
    """Two epochs, or what is left of them; the module, and all that a checkpoint holds at the end."""
    module = kind(configure, folder)
    loop = trainer(ours, max_epochs=2)
    loop.fit(
        module, Resumable(classification(EPOCH, size=8)), ckpt_path=ckpt, weights_only=None if ckpt is None else True
    )
    return module, loop._checkpoint_connector.dump_checkpoint(weights_only=False)


def resumes(
    folder: Path,
    make: Callable[[], MasterWeightPrecision],
    configure: Configure,
    names: Iterable[str] = SAVED,
    kind: type[Saves] = Saves,
) -> None:
    whole, end = run(make(), configure, kind, folder)
    assert end["MasterWeightPrecision"]["skipped_steps"] >= 2
    for name in names:
        resumed, same_end = run(make(), configure, kind, ckpt=folder / f"{name}.ckpt")
        assert resumed.losses == whole.losses[SAVED[name] :], name
        assert resumed.scales == whole.scales[SAVED[name] :], name
        assert same_end["MasterWeightPrecision"] == end["MasterWeightPrecision"]
        for key in ("state_dict", "optimizer_states", "lr_schedulers"):
            torch.testing.assert_close(same_end[key], end[key], rtol=0, atol=0)


@pytest.mark.parametrize("optimizer_state", MOMENT_STORAGES)
@pytest.mark.parametrize("master_weights", MASTER_STORAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_in_every_storage(tmp_path: Path, precision: str, master_weights: str, optimizer_state: str) -> None:
    resumes(
        tmp_path,
        lambda: plugin(precision, master_weights=master_weights, optimizer_state=optimizer_state),
        with_schedule(adamw),
        ["step=4"],
    )


OPTIMIZERS: dict[str, Any] = {
    "adamw": adamw,
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, amsgrad=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_every_optimizer_from_anywhere_in_an_epoch(tmp_path: Path, precision: str, optimizer: str) -> None:
    resumes(tmp_path, lambda: plugin(precision), with_schedule(OPTIMIZERS[optimizer]))


@pytest.mark.parametrize("optimizer_state", MOMENT_STORAGES)
def test_amsgrads_third_moment(tmp_path: Path, optimizer_state: str) -> None:
    configure = with_schedule(OPTIMIZERS["amsgrad"])
    resumes(tmp_path, lambda: plugin("bf16-true", optimizer_state=optimizer_state), configure, ["step=4"])


@pytest.mark.parametrize("master_weights", MASTER_STORAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_weights_that_somebody_else_writes_too(tmp_path: Path, precision: str, master_weights: str) -> None:
    """What was not changed keeps its master's bits: after the file as before it."""
    resumes(tmp_path, lambda: plugin(precision, master_weights=master_weights), with_schedule(adamw), kind=Clamping)


def test_with_gradients_that_are_released(tmp_path: Path) -> None:
    resumes(tmp_path, lambda: MasterWeightPrecision("bf16-true", **PRESETS["minimal"]), with_schedule(adamw))


def test_with_two_optimizers_that_the_module_steps_itself(tmp_path: Path) -> None:
    def configure(module: Any) -> Any:
        return [adamw(module.net[0].parameters()), OPTIMIZERS["sgd"](module.net[3:].parameters())]

    resumes(tmp_path, lambda: plugin("16-true"), configure, ["step=4"], Manual)


def test_a_schedule_that_waits_for_skipped_steps_goes_on_waiting(tmp_path: Path) -> None:
    """Every second step: it owes a call for two skipped ones, and one of them was before the file."""
    resumes(tmp_path, lambda: plugin("bf16-true"), with_schedule(adamw, frequency=2))


def test_adam_resumes_as_adam_with_its_weight_decay_in_the_gradient(tmp_path: Any) -> None:
    """torch's AdamW, which the update is built on, makes every group that it loads a decoupled one."""

    def module() -> Classifier:
        return Classifier(mlp(), lambda module: torch.optim.Adam(module.parameters(), lr=1e-2, weight_decay=0.1))

    batches = classification(6)
    whole, second = module(), module()
    fit(whole, batches, MasterWeightPrecision("bf16-true"), max_epochs=2)
    fit(module(), batches, MasterWeightPrecision("bf16-true")).save_checkpoint(tmp_path / "half-way.ckpt")
    ours = trainer(MasterWeightPrecision("bf16-true"), max_epochs=2)
    ours.fit(second, loader(batches), ckpt_path=tmp_path / "half-way.ckpt", weights_only=True)
    assert not ours.optimizers[0].param_groups[0]["decoupled_weight_decay"]
    assert second.losses == whole.losses[6:]
