"""When training goes wrong it is said, once, with a name and a remedy; and never when it does not."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LinearLR, OneCycleLR
from training import Classifier, Configure, adamw, classification, fit, mlp

from lightning_mpt import DynamicLossScale, MasterWeightPrecision
from lightning_mpt.diagnosis import SMALLEST_EPS

PRECISIONS = ("16-true", "bf16-true")


def said_by(train: Callable[[], Any]) -> list[str]:
    """Everything that is warned of meanwhile, every time it is."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train()
    return [str(one.message) for one in caught if one.category is UserWarning and "workers" not in str(one.message)]


class SqrtOfZero(nn.Module):
    """Finite forward; in backward 1 / (2 sqrt(0)) * 0, which is NaN."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x * 0).sqrt()


class Overflows(nn.Module):
    """Activations beyond float16's range, and with them the loss."""

    def forward(self, x: Tensor) -> Tensor:
        return (x * 1e5).float().to(x.dtype)


def net(part: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), part, nn.Linear(8, 4))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_that_only_skips_says_that_backward_is_why(precision: Any) -> None:
    """Once, and then stops. The modules below the trouble are named, those above it are not."""
    plugin = MasterWeightPrecision(precision, loss_scale=DynamicLossScale(init_scale=4.0))
    plugin.warn_after_skips, plugin.error_after_skips = 3, 10

    def train() -> None:
        with pytest.raises(RuntimeError, match=r"10 steps in a row were skipped.*at loss scale 1,"):
            fit(Classifier(net(SqrtOfZero())), classification(30), plugin)

    (said,) = said_by(train)
    assert said.startswith("3 steps in a row were skipped")
    assert "Not finite now: net.0.weight, net.0.bias." in said
    assert "as backward comes to them: net.0 (Linear)." in said
    assert "The loss is finite, so the trouble is in backward" in said


def test_a_run_that_only_skips_says_that_forward_is_why() -> None:
    plugin = MasterWeightPrecision("16-true", loss_scale=None)
    with (
        pytest.warns(UserWarning, match=r"net\.3 \(Linear\), net\.0 \(Linear\)\. The loss is nan already.*forward"),
        pytest.raises(RuntimeError, match="The loss is nan already: the trouble is in the forward pass, or in the data"),
    ):
        fit(Classifier(net(Overflows())), classification(120), plugin)
