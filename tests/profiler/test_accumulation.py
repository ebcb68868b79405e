"""A step of several batches: gradients accumulate, and the step is over once the optimizer has stepped."""

from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.utils.data import DataLoader, IterableDataset

from lightning_mpt.profiler import Category, MemoryProfiler

from .test_lightning import Classifier, Manual, data, trainer

WEIGHTS = 4 * (256 * 65 + 10 * 257)
"""Bytes of the parameters, and so of the gradients; AdamW keeps twice as many."""


class Counting(Classifier):
    """Notes how many batches had come when the optimizer stepped, and in which batches hooks were on."""

    def __init__(self) -> None:
        super().__init__()
        self.stepped_after: list[int] = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.stepped_after.append(len(self.hooks_seen))

    @property
    def recorded(self) -> list[int]:
        """The batches, counted from 1."""
        return [number for number, seen in enumerate(self.hooks_seen, 1) if seen]


def fit(module: L.LightningModule, batches: Any, tmp_path: Any, **options: Any) -> MemoryProfiler:
    profiler = MemoryProfiler(tmp_path, warmup_steps=options.pop("warmup_steps", 2), steps=options.pop("steps", 3))
    trainer(profiler, tmp_path, **options).fit(module, batches)
    return profiler


def test_warm_up_and_counted_steps_are_the_optimizers(tmp_path: Any) -> None:
    module = Counting()
    report = fit(module, data(50), tmp_path, accumulate_grad_batches=8).report
    assert report.steps == 3
    assert module.recorded == list(range(9, 41))  # from the last step of warming up on
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.categories[Category.OPTIMIZER_STATE] >= 2 * WEIGHTS
    assert report.categories[Category.UNATTRIBUTED] <= 0.01 * report.peak_bytes
    assert report.phases["optimizer_step"].categories[Category.GRADIENTS] == WEIGHTS
    assert report.phases["forward"].categories[Category.GRADIENTS] == WEIGHTS  # of the batches before
    assert report.phases["backward"].categories[Category.INPUTS] == 32 * 64 * 4 + 32 * 8  # those are gone


def test_the_peak_does_not_depend_on_how_many_batches_accumulate(tmp_path: Any) -> None:
    peaks = {
        fit(Classifier(), data(5 * number), tmp_path, accumulate_grad_batches=number).report.peak_bytes // 1024
        for number in (2, 3, 6)
    }
    assert len(peaks) == 1


def test_the_last_step_of_an_epoch_may_have_fewer_batches(tmp_path: Any) -> None:
    module = Counting()
    fit(module, data(5), tmp_path, accumulate_grad_batches=3, max_epochs=4)
    assert module.stepped_after[:5] == [3, 5, 8, 10, 13]
    assert module.recorded == list(range(4, 14))


def test_how_many_accumulate_may_change(tmp_path: Any) -> None:
    module = Counting()
    schedule = GradientAccumulationScheduler({0: 1, 1: 2, 2: 4})
    fit(module, data(4), tmp_path, callbacks=[schedule], max_epochs=4, warmup_steps=3, steps=4)
    assert module.stepped_after[:7] == [1, 2, 3, 4, 6, 8, 12]
    assert module.recorded == list(range(3, 13))


def test_data_of_unknown_length_are_fetched_ahead(tmp_path: Any) -> None:
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter([(torch.ones(32, 64), torch.zeros(32, dtype=torch.long))] * 5)

    module, batches = Counting(), DataLoader(Stream(), batch_size=None)
    assert fit(module, batches, tmp_path, accumulate_grad_batches=2, max_epochs=2).report.steps == 3
    assert module.stepped_after[:5] == [2, 4, 5, 7, 9]
    assert module.recorded == list(range(3, 10))


def test_a_fit_that_ends_within_a_step_is_reported_without_it(tmp_path: Any) -> None:
    class Ends(Counting):
        def on_train_batch_end(self, *_: Any) -> None:
            self.trainer.should_stop = len(self.hooks_seen) >= 14

    module = Ends()
    report = fit(module, data(20), tmp_path, accumulate_grad_batches=4, min_epochs=0).report
    assert len(module.hooks_seen) < 20
    assert report.steps == 1


def test_steps_without_an_optimizers_are_none(tmp_path: Any) -> None:
    with pytest.warns(UserWarning, match="fit ended after too few steps: it needs warmup_steps=2"):
        fit(Counting(), data(8), tmp_path, accumulate_grad_batches=4)


def test_by_hand_every_batch_is_a_step(tmp_path: Any) -> None:
    class Seldom(Manual):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            if batch_idx % 4 == 3:
                super().training_step(batch, batch_idx)

    assert fit(Seldom(), data(8), tmp_path).report.steps == 3
