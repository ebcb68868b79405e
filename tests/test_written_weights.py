"""Weights that the user writes to while they are half: the masters follow, as FP32 weights would."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from training import Classifier, Configure, adamw, classification, fit, mlp

from lightning_mpt import MasterWeightPrecision

LIMIT = 0.05
HALVES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}
OPTIMIZERS: dict[str, Configure] = {
    "adamw": adamw(lr=5e-3),
    "rmsprop": lambda module: torch.optim.RMSprop(module.parameters(), lr=5e-3),
}


def plugin(precision: Any, **options: Any) -> MasterWeightPrecision:
    return MasterWeightPrecision(precision, loss_scale=128.0, **options)


def through_data(parameter: Tensor, write: Callable[[Tensor], Any]) -> None:
    write(parameter.data)


def in_place(parameter: Tensor, write: Callable[[Tensor], Any]) -> None:
    with torch.no_grad():
        write(parameter)


class Writing(Classifier):
    """Writes to all its weights after every step."""

    def __init__(self, way: Callable[..., None], write: Callable[[Tensor], Any], configure: Configure) -> None:
        super().__init__(mlp(width=16), configure)
        self._way, self._write = way, write

    def on_train_batch_end(self, *_: Any) -> None:
        for parameter in self.net.parameters():
            self._way(parameter, self._write)


@pytest.mark.parametrize("way", [through_data, in_place], ids=["data", "no_grad"])
@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_clamp_of_the_weights_as_in_a_wgan_holds(optimizer: str, precision: str, way: Callable[..., None]) -> None:
    fp32, ours = (Writing(way, lambda weight: weight.clamp_(-LIMIT, LIMIT), OPTIMIZERS[optimizer]) for _ in range(2))
    fit(fp32, classification(20))
    fit(ours, classification(20), plugin(precision))
    # What was written is half, and a master may be anything that rounds to it.
    limit = LIMIT * (1 + 1.5 * torch.finfo(HALVES[precision]).eps)
    assert max(weight.abs().max() for weight in ours.parameters()) <= limit
    torch.testing.assert_close(ours.losses, fp32.losses, rtol=5e-3, atol=0)


@pytest.mark.parametrize("way", [through_data, in_place], ids=["data", "no_grad"])
def test_a_mask_of_zeros_holds(way: Callable[..., None]) -> None:
    """Zeros written over weights that were rounded up once gave a NaN of the bits below."""

    def prune(weight: Tensor) -> None:
        weight.view(-1)[::2] = 0.0

    fp32, ours = (Writing(way, prune, adamw(lr=5e-3)) for _ in range(2))
    fit(fp32, classification(20))
    fit(ours, classification(20), plugin("bf16-true"))
    assert all(weight.view(-1)[::2].abs().max() < 1e-38 for weight in ours.parameters())
    torch.testing.assert_close(ours.losses, fp32.losses, rtol=2e-2, atol=0)


class Following(Classifier):
    """A frozen target that follows the network, as in MoCo and BYOL."""

    def __init__(self, assigned: bool) -> None:
        super().__init__(mlp(width=16))
        self.target = copy.deepcopy(self.net).requires_grad_(False)
        for weight in self.target.parameters():
            weight.data.zero_()
        self._assigned = assigned

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)

    def on_train_batch_end(self, *_: Any) -> None:
        for weight, followed in zip(self.target.parameters(), self.net.parameters(), strict=True):
            if self._assigned:
                weight.data = weight.data * 0.9 + followed.data * 0.1
            else:
                weight.data.mul_(0.9).add_(followed.data, alpha=0.1)


@pytest.mark.parametrize("assigned", [False, True], ids=["in place", "assigned"])
@pytest.mark.parametrize("precision", HALVES)
def test_a_frozen_target_that_follows_the_network_ends_where_fp32s_does(precision: str, assigned: bool) -> None:
    fp32, ours = Following(assigned), Following(assigned)
    fit(fp32, classification(20))
    fit(ours, classification(20), plugin(precision))
    for found, expected in zip(ours.target.parameters(), fp32.target.parameters(), strict=True):
        assert (found - expected).norm() <= 0.05 * expected.norm()  # an average that is kept in half


class Bounded(Classifier):
    """An embedding that is written to in every forward, where its rows are too long: here they never are."""

    def __init__(self, max_norm: float | None) -> None:
        net = nn.Embedding(8, 4, max_norm=max_norm)
        nn.init.ones_(net.weight)
        super().__init__(net, adamw(lr=1e-5, weight_decay=0.0))

    def training_step(self, *_: Any) -> Tensor:
        return self.net(torch.arange(8)).float().sum()


@pytest.mark.parametrize("precision", HALVES)
def test_a_write_that_changes_nothing_keeps_the_small_updates(precision: str) -> None:
    """Each is far below what a half weight near 1 can show."""
    fp32, ours = Bounded(100.0), Bounded(100.0)
    fit(fp32, classification(50))
    fit(ours, classification(50), plugin(precision))
    moved, expected = 1 - ours.net.weight, 1 - fp32.net.weight
    torch.testing.assert_close(moved, expected, rtol=0.05, atol=0)
