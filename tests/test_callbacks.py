"""Lightning's own callbacks: what they do to an FP32 run they do here, to the FP32 masters."""

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    Callback,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from training import Classifier, Validated, adamw, classification, fit, loader, mlp, trainer

from lightning_mpt import MasterWeightPrecision

STORAGES = [("16-true", "split"), ("bf16-true", "split"), ("bf16-true", "float32"), ("bf16-true", "split8")]
CLOSE = {"rtol": 1e-6, "atol": 1e-7}
"""For averages that are added up in another order."""


def sgd(module: L.LightningModule) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.1)


class Buffered(Validated):
    """With a normalization of each kind and a buffer that half precision would round."""

    def __init__(self, configure: Any = None) -> None:
        torch.manual_seed(0)
        norms = nn.Linear(16, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.Linear(8, 4)
        super().__init__(nn.Sequential(*norms), configure)
        self.register_buffer("third", torch.tensor([1 / 3]))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.third


def masters(trainer: L.Trainer) -> list[Tensor]:
    plugin = trainer.precision_plugin
    assert isinstance(plugin, MasterWeightPrecision)
    return [master.clone() for master in plugin.master_params(trainer.optimizers[0])]


class Watch(Callback):
    """Notes the masters where something happens to them, and what validation sees."""

    def __init__(self) -> None:
        self.steps: list[list[Tensor]] = []
        self.epochs: list[list[Tensor]] = []
        self.batches: list[list[Tensor]] = []
        self.validated: list[tuple[list[Tensor], list[Tensor]]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.epochs.append(masters(trainer))

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        self.batches.append(masters(trainer))

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.steps.append(masters(trainer))

    def on_validation_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.validated.append((masters(trainer), [p.detach().clone() for p in module.parameters()]))


def train(module: L.LightningModule, callback: Callback, plugin: MasterWeightPrecision | None, **options: Any) -> Watch:
    watch = Watch()
    ours = trainer(plugin, callbacks=[watch, callback], **{"num_sanity_val_steps": 0, **options})
    ours.fit(module, loader(classification(3)), loader(classification(1)))
    return watch


@pytest.mark.parametrize(
    ("precision", "master_weights", "configure"),
    [*((*storage, adamw()) for storage in STORAGES), ("16-true", "split", sgd)],
)
def test_a_moving_average_is_that_of_the_masters_after_every_step(
    precision: Any, master_weights: str, configure: Any
) -> None:
    """Through validations, which run on the average, to the end, when the module holds it."""
    module = Buffered(configure)
    plugin = MasterWeightPrecision(precision, master_weights=master_weights)
    watch = train(module, EMAWeightAveraging(decay=0.75), plugin, max_epochs=2)
    average = copy.deepcopy(watch.steps[0])
    averages = [average]
    for step in watch.steps[1:]:
        average = [0.75 * a + 0.25 * b for a, b in zip(average, step, strict=True)]
        averages.append(average)
    torch.testing.assert_close([p.detach() for p in module.parameters()], average, rtol=0, atol=0)
    assert torch.equal(module.third, torch.tensor([1 / 3]))
    for (seen, weights), expected in zip(watch.validated, (averages[2], averages[5]), strict=True):
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)
        assert {p.dtype for p in weights} == {torch.float32, torch.bfloat16 if "bf" in precision else torch.float16}
        torch.testing.assert_close([p.float() for p in weights], expected, rtol=2**-8, atol=2**-24)


@pytest.mark.parametrize(("precision", "master_weights"), STORAGES)
def test_an_average_beside_changes_nothing_in_training(precision: Any, master_weights: str) -> None:
    steps = []
    for callback in (Callback(), WeightAveraging()):
        plugin = MasterWeightPrecision(precision, master_weights=master_weights)
        steps.append(train(Buffered(), callback, plugin, max_epochs=2).steps)
    torch.testing.assert_close(steps[0], steps[1], rtol=0, atol=0)


def test_a_validation_after_the_run_leaves_the_average_and_what_can_be_trained() -> None:
    """It exchanges values in inference mode, and what is made there cannot be trained."""

    class Tracks(Buffered):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(16))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.mean.lerp_(batch[0].mean(dim=0), 0.1)
            return super().training_step(batch, batch_idx)

    module = Tracks()
    ours = trainer(MasterWeightPrecision("16-true"), callbacks=[EMAWeightAveraging(decay=0.5)], num_sanity_val_steps=0)
    ours.fit(module, loader(classification(3)), loader(classification(1)))
    average = copy.deepcopy(module.state_dict())
    assert module.mean.any()
    ours.validate(module, loader(classification(1)), verbose=False)
    torch.testing.assert_close(module.state_dict(), average, rtol=0, atol=0)
    F.cross_entropy(module(torch.ones(2, 16) * module.mean), torch.tensor([0, 1])).backward()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    module.mean.lerp_(torch.ones(16), 0.1)


def test_a_run_with_an_average_resumes_bit_for_bit(tmp_path: Any) -> None:
    class Saves(EMAWeightAveraging):
        def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            super().on_train_epoch_end(trainer, module)
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    def run(max_epochs: int, **options: Any) -> dict[str, Tensor]:
        module = Buffered()
        ours = trainer(
            MasterWeightPrecision("16-true"),
            callbacks=[Saves(decay=0.5)],
            max_epochs=max_epochs,
            num_sanity_val_steps=0,
        )
        ours.fit(module, loader(classification(3)), loader(classification(1)), **options)
        return module.state_dict()

    whole, half = run(2), run(1)
    saved = torch.load(tmp_path / "0.ckpt", weights_only=True)
    torch.testing.assert_close(saved["state_dict"], half, rtol=0, atol=0)  # the average
    assert not torch.equal(saved["current_model_state"]["net.0.weight"], half["net.0.weight"])
    resumed = run(2, ckpt_path=tmp_path / "0.ckpt", weights_only=True)
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)


@pytest.mark.parametrize(("precision", "master_weights"), STORAGES)
@pytest.mark.parametrize("batchnorm", [False, True], ids=["", "batchnorm"])
def test_stochastic_weight_averaging_averages_masters(precision: Any, master_weights: str, batchnorm: bool) -> None:
    """From the second epoch on, at the start of each. With BatchNorm, Lightning runs an epoch more on the average, for
    the statistics (and takes a step at its end, in FP32 too)."""
    module = Buffered() if batchnorm else Validated(mlp(width=16))
    callback = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2, annealing_epochs=1)
    watch = train(
        module, callback, MasterWeightPrecision(precision, master_weights=master_weights), max_epochs=4,
        limit_val_batches=0,
    )  # fmt: skip
    expected = [torch.stack(same).mean(dim=0) for same in zip(*watch.epochs[1:4], strict=True)]
    average = watch.batches[12] if batchnorm else [p.detach() for p in module.parameters()]
    torch.testing.assert_close(average, expected, **CLOSE)


class Backboned(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Identity(), self._only_what_trains)
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 4)

    @staticmethod
    def _only_what_trains(module: L.LightningModule) -> Any:
        return torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")  # BatchNorm's, never frozen
@pytest.mark.parametrize("precision", [None, "16-true", "bf16-true"])
def test_a_backbone_thaws_in_mid_run_and_resumes(tmp_path: Any, precision: Any) -> None:
    class Notes(Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: Any) -> None:
            first.append(module.state_dict()["backbone.0.weight"].clone())
            groups.append([(group["lr"], len(group["params"])) for group in trainer.optimizers[0].param_groups])
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "frozen.ckpt")

    def run(**options: Any) -> Backboned:
        module = Backboned()
        finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3, rounding=6)
        plugin = None if precision is None else MasterWeightPrecision(precision)
        ours = trainer(plugin, max_epochs=3, callbacks=[finetuning, Notes()])
        ours.fit(module, loader(classification(3)), **options)
        return module

    first: list[Tensor] = []
    groups: list[Any] = []
    whole = run()
    start = Backboned().backbone[0].weight
    assert torch.equal(first[0], start)
    assert not torch.equal(first[1], start)
    assert not torch.equal(first[2], first[1])
    assert [[count for _, count in epoch] for epoch in groups] == [[4], [4, 4], [4, 4]]
    assert groups[2][1][0] == pytest.approx(2e-3)  # doubled by the callback each epoch
    resumed = run(ckpt_path=tmp_path / "frozen.ckpt", weights_only=True)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_the_best_checkpoint_is_fp32_and_validates_as_it_did(tmp_path: Any, precision: Any) -> None:
    def configure(module: L.LightningModule) -> Any:  # so that the best is not the last
        optimizer = torch.optim.AdamW(module.parameters(), lr=2e-2)
        return [optimizer], [StepLR(optimizer, 2, 50.0)]

    module = Validated(mlp(width=16), configure)
    best = ModelCheckpoint(tmp_path, monitor="val_loss", filename="best")
    last = ModelCheckpoint(tmp_path, filename="last")
    watch = Watch()
    ours = trainer(
        MasterWeightPrecision(precision), callbacks=[watch, best, last], max_epochs=4, enable_checkpointing=True,
        num_sanity_val_steps=0,
    )  # fmt: skip
    ours.fit(module, loader(classification(3)), loader(classification(1)))
    files = [torch.load(callback.best_model_path, weights_only=True) for callback in (best, last)]
    assert files[0]["epoch"] < files[1]["epoch"] == 3
    for saved in files:
        expected = watch.validated[saved["epoch"]][0]
        torch.testing.assert_close(list(saved["state_dict"].values()), expected, rtol=0, atol=0)
    (again,) = ours.validate(
        module, loader(classification(1)), ckpt_path=best.best_model_path, verbose=False, weights_only=True
    )
    assert again["val_loss"] == best.best_model_score


def test_early_stopping_stops_where_an_fp32_run_stops() -> None:
    stopped = []
    for plugin in (None, MasterWeightPrecision("16-true")):
        stopping = EarlyStopping("val_loss", patience=1, min_delta=0.03)
        ours = trainer(plugin, callbacks=[stopping], max_epochs=30, num_sanity_val_steps=0)
        ours.fit(Validated(mlp(width=16)), loader(classification(2)), loader(classification(1)))
        stopped.append((ours.current_epoch, stopping.stopped_epoch))
    assert stopped[0] == stopped[1]
    assert 1 < stopped[1][0] < 30


def test_a_timer_stops_between_two_steps() -> None:
    class Ticks(Timer):  # by steps, whatever the machine
        def time_elapsed(self, *_: Any) -> float:
            return len(module.losses)

    module = Classifier(mlp(width=16))
    fit(module, classification(4), MasterWeightPrecision("16-true"), callbacks=[Ticks(timedelta(seconds=2))])
    assert len(module.losses) == 2


def test_learning_rates_are_logged_under_the_names_of_an_fp32_run(tmp_path: Any) -> None:
    class Many(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp(width=16))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            for optimizer, schedule in zip(self.optimizers(), self.lr_schedulers(), strict=True):  # type: ignore[arg-type]
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()

        def configure_optimizers(self) -> Any:
            first, second, third = (self.net[i] for i in (0, 2, 4))
            optimizers = [
                torch.optim.AdamW(first.parameters(), lr=0.1),
                torch.optim.SGD(second.parameters(), lr=0.2, momentum=0.5),
                torch.optim.SGD([third.weight], lr=0.3, momentum=0.9),
                torch.optim.Adam([third.bias], lr=0.4),
            ]
            return optimizers, [StepLR(optimizer, 1, 0.5) for optimizer in optimizers]

    logged = []
    for plugin in (None, MasterWeightPrecision("16-true")):
        monitor = LearningRateMonitor("step")
        fit(Many(), classification(3), plugin, callbacks=[monitor], logger=CSVLogger(tmp_path), log_every_n_steps=1)
        logged.append(monitor.lrs)
    assert logged[0] == logged[1]
    assert set(logged[1]) == {"lr-AdamW", "lr-SGD", "lr-SGD-1", "lr-Adam"}


@pytest.mark.filterwarnings(r"ignore:.*\.fit\(ckpt_path=:UserWarning")  # of Lightning's, wherever this callback is
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_file_written_on_an_exception_is_fp32_and_goes_on_exactly(tmp_path: Path) -> None:
    same = classification(1) * 6  # where in the epoch it was, this loader does not say

    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            if batch_idx == 3:
                raise RuntimeError("out of luck")
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="out of luck"):
        fit(
            Fails(mlp(), adamw()), same, MasterWeightPrecision("16-true"),
            callbacks=[OnExceptionCheckpoint(tmp_path)], enable_checkpointing=True, default_root_dir=tmp_path,
        )  # fmt: skip
    (file,) = tmp_path.glob("*.ckpt")
    saved = torch.load(file, weights_only=True)
    assert saved["global_step"] == 3
    assert {value.dtype for value in saved["state_dict"].values()} == {torch.float32}
    resumed, whole = Classifier(mlp(), adamw()), Classifier(mlp(), adamw())
    trainer(MasterWeightPrecision("16-true")).fit(resumed, loader(same), ckpt_path=file)
    fit(whole, same, MasterWeightPrecision("16-true"))
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
