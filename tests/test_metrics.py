"""What reaches the Trainer's loggers and its progress bar."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from training import Classifier, classification, fit, mlp

from lightning_mpt import MasterWeightPrecision


def test_metrics_reach_the_logger_and_the_progress_bar(tmp_path: Any) -> None:
    ours = fit(
        Classifier(mlp()), classification(4), MasterWeightPrecision("16-true", loss_scale=64.0),
        logger=CSVLogger(tmp_path), log_every_n_steps=1,
    )  # fmt: skip
    assert ours.progress_bar_metrics["mpt/loss_scale"] == 64.0
    assert ours.progress_bar_metrics["mpt/skipped_steps"] == 0.0
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert {"mpt/loss_scale", "mpt/skipped_steps"} <= set(lines[0].split(","))
    assert len(lines) == 1 + 4


@pytest.mark.filterwarnings("ignore:.*`dataloader_iter`")  # it is experimental, says Lightning
def test_metrics_are_logged_of_a_training_step_that_draws_its_own_batches() -> None:
    class Draws(Classifier):
        def training_step(self, dataloader_iter: Any) -> Tensor:  # type: ignore[override]
            batch, batch_idx, _ = next(dataloader_iter)  # as it comes from the loader
            return super().training_step(plugin.convert_input(batch), batch_idx)  # type: ignore[return-value]

    plugin = MasterWeightPrecision("16-true", loss_scale=64.0)
    ours = fit(Draws(mlp()), classification(3), plugin)
    assert ours.progress_bar_metrics["mpt/loss_scale"] == 64.0


@pytest.mark.parametrize("name", ["Adam", "AdamW", "SGD"])
def test_learning_rates_are_logged_under_the_names_of_the_users_optimizers(name: str, tmp_path: Any) -> None:
    def configure(module: L.LightningModule) -> Any:
        return getattr(torch.optim, name)(module.parameters(), lr=1e-2)

    monitor = LearningRateMonitor()
    options = {"callbacks": [monitor], "logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    fit(Classifier(mlp(), configure), classification(2), MasterWeightPrecision("bf16-true"), **options)
    assert list(monitor.lrs) == [f"lr-{name}"]
