"""Learning-rate schedules under the Trainer: the rates are those of an FP32 run, and of its real steps only."""

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.utilities.rank_zero import WarningCache
from torch import Tensor
from torch.optim.lr_scheduler import CosineAnnealingLR, CyclicLR, LinearLR, OneCycleLR, ReduceLROnPlateau, StepLR
from training import Classifier, classification, fit, mlp

from lightning_mpt import MasterWeightPrecision

Schedule = Callable[[torch.optim.Optimizer], Any]

SCHEDULES: dict[str, Schedule] = {
    "step": lambda o: StepLR(o, 2, 0.5),
    "cosine": lambda o: CosineAnnealingLR(o, 12),
    "one cycle": lambda o: OneCycleLR(o, 1e-2, total_steps=12),
    "cyclic": lambda o: CyclicLR(o, 1e-4, 1e-2, step_size_up=3, cycle_momentum=False),
}


class Scheduled(Classifier):
    """Notes what every batch's step was taken with, and spoils the gradients of the batches that it is told."""

    def __init__(self, schedule: Schedule, broken: tuple[int, ...] = (), sgd: bool = False, **config: Any) -> None:
        def configure(module: L.LightningModule) -> Any:
            parameters = module.parameters()
            optimizer: Any = torch.optim.SGD(parameters, 1e-2, 0.9) if sgd else torch.optim.AdamW(parameters, 1e-2)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), **config}}

        super().__init__(mlp(width=16), configure)
        self._broken, self._batch = broken, 0
        self.settings: list[tuple[float, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        (group,) = optimizer.param_groups
        self.settings.append((group["lr"], group.get("betas", group.get("momentum"))))
        if self._batch in self._broken:
            next(self.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
        self._batch += 1

    def real(self) -> list[tuple[float, Any]]:
        """The settings of the batches that were not spoilt."""
        return [setting for batch, setting in enumerate(self.settings) if batch not in self._broken]


@pytest.mark.parametrize(
    ("schedule", "interval", "frequency"),
    [
        ("step", "step", 2),
        ("step", "epoch", 1),
        ("cosine", "epoch", 2),
        ("one cycle", "step", 1),
        ("cyclic", "step", 1),
    ],
)
def test_rates_and_betas_are_those_of_an_fp32_run(schedule: str, interval: str, frequency: int) -> None:
    settings = []
    for plugin in (None, MasterWeightPrecision("16-true")):
        module = Scheduled(SCHEDULES[schedule], interval=interval, frequency=frequency)
        fit(module, classification(2), plugin, max_epochs=5)
        settings.append(module.settings)
    assert settings[0] == settings[1]
    assert len({lr for lr, _ in settings[1]}) > 1
    assert (len({betas for _, betas in settings[1]}) > 1) == (schedule == "one cycle")


@pytest.mark.parametrize("schedule", ["cosine", "one cycle"])
@pytest.mark.parametrize("sgd", [False, True], ids=["adamw", "sgd"])
def test_the_real_steps_have_the_settings_of_a_run_that_skips_none(schedule: str, sgd: bool) -> None:
    """The first step is skipped too, and nothing warns that a schedule went before the optimizer: none did."""
    plain = Scheduled(SCHEDULES[schedule], sgd=sgd, interval="step")
    fit(plain, classification(6), MasterWeightPrecision("bf16-true"))
    module = Scheduled(SCHEDULES[schedule], (0, 3, 4), sgd=sgd, interval="step")
    plugin = MasterWeightPrecision("bf16-true")
    fit(module, classification(9), plugin)
    assert plugin.skipped_steps == 3
    assert module.real() == plain.settings


def test_an_epochs_schedule_goes_on_whatever_was_skipped() -> None:
    module = Scheduled(lambda o: StepLR(o, 1, 0.5), broken=(0, 1, 2, 4), interval="epoch")
    fit(module, classification(3), MasterWeightPrecision("bf16-true"), max_epochs=3)
    assert [lr for lr, _ in module.settings] == [1e-2] * 3 + [5e-3] * 3 + [2.5e-3] * 3


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_a_plateau_is_seen_where_an_fp32_run_sees_it(interval: str) -> None:
    settings = []
    for plugin in (None, MasterWeightPrecision("16-true")):
        module = Scheduled(
            lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=1.0), interval=interval, monitor="loss"
        )  # a loss must be below 0 to count as better: every look reduces
        fit(module, classification(3), plugin, max_epochs=3)
        settings.append(module.settings)
    assert settings[0] == settings[1]
    assert settings[1][-1][0] == 1e-2 / 2 ** (8 if interval == "step" else 2)


def test_the_loss_of_a_skipped_step_is_no_plateau() -> None:
    module = Scheduled(
        lambda o: ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=1.0),
        (1, 2, 3),
        interval="step",
        monitor="loss",
    )
    fit(module, classification(6), MasterWeightPrecision("bf16-true"))
    assert [lr for lr, _ in module.settings] == [1e-2] + [5e-3] * 4 + [2.5e-3]


def test_a_schedule_may_come_before_any_step_where_training_step_gave_none(monkeypatch: Any) -> None:
    class LateStart(Scheduled):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) if batch_idx else None

    rates = []
    for plugin in (None, MasterWeightPrecision("16-true")):
        module = LateStart(lambda o: LinearLR(o, 1.0, 0.1, total_iters=4), interval="step")
        monkeypatch.setattr(Closure, "warning_cache", WarningCache())  # Lightning warns once a process
        with pytest.warns(UserWarning, match="`training_step` returned `None`"):
            fit(module, classification(4), plugin)
        rates.append([lr for lr, _ in module.settings])
    assert rates[1] == rates[0]


def test_several_optimizers_keep_their_own_schedules() -> None:
    """By hand, as in manual optimization: where a step is skipped, the user asks the plugin."""

    class Two(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = mlp(width=16), mlp(width=16)
            self.rates: list[tuple[float, float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, schedule, net in zip(self.optimizers(), self.lr_schedulers(), (self.a, self.b), strict=True):  # type: ignore[arg-type]
                optimizer.zero_grad()
                self.manual_backward(F.cross_entropy(net(batch[0]), batch[1]))
                if batch_idx == 1 and net is self.b:
                    next(net.parameters()).grad.fill_(float("nan"))  # type: ignore[union-attr]
                before = plugin.skipped_steps
                optimizer.step()
                if plugin.skipped_steps == before:
                    schedule.step()
            self.rates.append(tuple(o.param_groups[0]["lr"] for o in self.optimizers()))  # type: ignore

        def configure_optimizers(self) -> Any:
            a = torch.optim.AdamW(self.a.parameters(), lr=1.0)
            b = torch.optim.SGD(self.b.parameters(), lr=1.0)
            return [a, b], [StepLR(a, 1, 0.5), StepLR(b, 2, 0.1)]

    module, plugin = Two(), MasterWeightPrecision("bf16-true")
    fit(module, classification(4), plugin)
    assert module.rates == [(0.5, 1.0), (0.25, 1.0), (0.125, 0.1), (0.0625, 0.1)]


def test_a_schedule_with_a_frequency_counts_real_steps_only() -> None:
    class Breaks(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.trainer.global_step % 2:
                next(self.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]

    schedules: list[LinearLR] = []

    def configure(module: L.LightningModule) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        schedules.append(LinearLR(optimizer, 1.0, 0.1, total_iters=100))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedules[0], "interval": "step", "frequency": 2}}

    fit(Breaks(mlp(), configure), classification(40), MasterWeightPrecision("bf16-true"))
    assert schedules[0].last_epoch == 10  # 20 real steps
    assert type(schedules[0]) is LinearLR


class AdamThenSGD(Scheduled):
    """Sets up another optimizer, with its schedule, for the second epoch."""

    def on_train_epoch_start(self) -> None:
        self.trainer.strategy.setup_optimizers(self.trainer)

    def configure_optimizers(self) -> Any:
        parameters, sgd = self.parameters(), self.trainer.current_epoch == 1
        optimizer: Any = torch.optim.SGD(parameters, 1e-1, 0.9) if sgd else torch.optim.AdamW(parameters, 1e-2)
        return [optimizer], [{"scheduler": StepLR(optimizer, 1, 0.9), "interval": "step"}]


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_what_is_set_up_again_in_mid_run_trains_as_in_fp32_and_waits_for_skipped_steps(precision: Any) -> None:
    runs = []
    for plugin, broken in (
        (None, ()),
        (MasterWeightPrecision(precision), ()),
        (MasterWeightPrecision(precision), (7,)),
    ):
        module = AdamThenSGD(SCHEDULES["step"], broken)
        ours = fit(module, classification(5), plugin, max_epochs=2)
        assert type(ours.optimizers[0]) is torch.optim.SGD
        runs.append((module, ours.callback_metrics["loss"].item()))
    (fp32, expected), (half, loss), (skipping, _) = runs
    assert loss == pytest.approx(expected, rel=0.01)
    assert half.settings == fp32.settings
    assert skipping.real() == fp32.settings[:9]
