"""Activation checkpointing runs again what forward ran: FP32 where that was, and no other values."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint as checkpointing
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import Classifier, adamw, classification, fit

from lightning_mpt import FabricMasterWeightPrecision, MasterWeightPrecision

PRECISIONS: list[Any] = ["16-true", "bf16-true"]


def masked(x: Tensor) -> Tensor:
    """fp16 does not reach the number."""
    return x.masked_fill(x < -1, -1e9).softmax(-1) * x


def solved(x: Tensor) -> Tensor:
    """Half has no kernel."""
    return x @ torch.linalg.inv(torch.eye(16) + 0.1 * (x.t() @ x).tanh())


def with_a_loss(x: Tensor) -> Tensor:
    """FP32 is saved of it, also where it is brought to FP32 before."""
    target = torch.arange(len(x)) % 4
    return x + F.cross_entropy(x, target) + F.cross_entropy(x.float() / 2, target)


class Recomputing(nn.Module):
    """One of these between two layers; run again in backward where that is asked for."""

    def __init__(self, function: Callable[[Tensor], Tensor], use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
        self.function, self.use_reentrant = function, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.use_reentrant is None:
            return self.last(self.function(x))
        return self.last(checkpoint(self.function, x, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("function", [masked, solved, with_a_loss])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_is_what_it_is_without_checkpointing(function: Callable[[Tensor], Tensor], precision: Any) -> None:
    trained = []
    for use_reentrant in (None, False, True):
        module = Classifier(Recomputing(function, use_reentrant), adamw())
        fit(module, classification(6), MasterWeightPrecision(precision))
        trained.append((module.losses, module.state_dict()))
    for other in trained[1:]:
        torch.testing.assert_close(other, trained[0], rtol=0, atol=0)


def test_so_it_is_in_fabric() -> None:
    trained = []
    for use_reentrant in (None, False):
        fabric = Fabric(accelerator="cpu", devices=1, plugins=[FabricMasterWeightPrecision("bf16-true")])
        net = Recomputing(solved, use_reentrant)
        model, optimizer = fabric.setup(net, torch.optim.AdamW(net.parameters(), lr=1e-2))
        for x, y in classification(4):
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()
            optimizer.zero_grad()
        trained.append(model.state_dict())
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=0)


def test_torchs_own_names_are_what_they_were_afterwards() -> None:
    before = checkpointing.CheckpointFunction, checkpointing._checkpoint_without_reentrant_generator

    def fails(x: Tensor) -> Tensor:
        assert checkpointing.CheckpointFunction is not before[0]
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        fit(Classifier(Recomputing(fails, False)), classification(1), MasterWeightPrecision("bf16-true"))
    assert before == (checkpointing.CheckpointFunction, checkpointing._checkpoint_without_reentrant_generator)
