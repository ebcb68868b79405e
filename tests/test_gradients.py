"""What becomes of gradients on their way to the step: clipped as they truly are, added up in FP32."""

import copy
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Classifier, adamw, classification, fit, mlp

from lightning_mpt import MasterWeightPrecision


@pytest.mark.parametrize("algorithm", ["norm", "value"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_clipping_acts_on_true_gradients(algorithm: str, optimizer: str) -> None:
    """A constant scale of 1024 changes nothing, and SGD's way is bounded by the clipped gradients."""
    ways = []
    for scale in (None, 1024.0):
        configure = adamw() if optimizer == "adamw" else lambda module: torch.optim.SGD(module.parameters(), lr=1.0)
        module = Classifier(mlp(), configure)
        start = copy.deepcopy(list(module.parameters()))
        plugin = MasterWeightPrecision("bf16-true", loss_scale=scale)
        fit(module, classification(1), plugin, gradient_clip_val=0.01, gradient_clip_algorithm=algorithm)
        ways.append([(end - begin).detach() for end, begin in zip(module.parameters(), start, strict=True)])
        assert (plugin.grad_norm is not None) == (algorithm == "norm")
    torch.testing.assert_close(ways[0], ways[1], rtol=1e-6, atol=1e-9)
    if optimizer == "sgd":
        whole = torch.cat([way.flatten() for way in ways[1]])
        measure = whole.norm() if algorithm == "norm" else whole.abs().max()
        assert measure.item() == pytest.approx(0.01, rel=1e-3)


def test_grad_norm_is_the_norm_of_the_fp32_gradients_before_clipping() -> None:
    (batch,) = classification(1)
    net = mlp()
    reference = copy.deepcopy(net)
    plugin = MasterWeightPrecision("16-true", loss_scale=512.0)
    fit(Classifier(net), [batch], plugin, gradient_clip_val=0.1)
    F.cross_entropy(reference(batch[0]), batch[1]).backward()
    norm = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None]))
    assert plugin.grad_norm == pytest.approx(norm.item(), rel=0.01)  # worst seen 1e-3: forward and backward are half


def test_accumulation_loses_no_small_addend() -> None:
    """One gradient of 1 and 64 of 2**-9 are 1.125; added up in bf16 they would stay 1."""

    class Sums(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8))

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return 65 * (self.weight * batch[0]).float().sum()  # 65: the Trainer takes the mean

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    module = Sums()
    batches = [(torch.full((8,), 1.0 if i == 0 else 2.0**-9),) for i in range(65)]
    fit(module, batches, MasterWeightPrecision("bf16-true"), accumulate_grad_batches=65)
    torch.testing.assert_close(module.weight.detach(), torch.full((8,), -1.125), rtol=1e-6, atol=0)


def test_gradients_are_half_where_nothing_accumulates() -> None:
    dtypes = []

    class Looks(Classifier):
        def on_after_backward(self) -> None:
            dtypes.append({p.grad.dtype for p in self.parameters() if p.grad is not None})

    for accumulated in (2, 1):
        fit(Looks(mlp()), classification(6), MasterWeightPrecision("bf16-true"), accumulate_grad_batches=accumulated)
    assert dtypes == [{torch.bfloat16}, {torch.float32}] * 3 + [{torch.bfloat16}] * 6


class ByHand(Classifier):
    """Steps what it is told to."""

    def __init__(self, kind: Any, which: str) -> None:
        super().__init__(mlp(), lambda module: kind(module.parameters(), lr=0.01))
        self.automatic_optimization = False
        self._which = which

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizers: dict[str, Any] = {
            "lightning's": self.optimizers(),
            "plain": self.optimizers(use_pl_optimizer=False),
            "the Trainer's": self.trainer.optimizers[0],
        }
        optimizer = optimizers[self._which]
        optimizer.zero_grad()
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.losses.append(loss.item())
        self.manual_backward(loss)
        self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_a_step_past_lightning_is_the_same_step(precision: Any, kind: Any) -> None:
    ends = []
    for which in ("lightning's", "plain", "the Trainer's"):
        plugin = MasterWeightPrecision(precision)
        module = ByHand(kind, which)
        fit(module, classification(6), plugin)
        ends.append((module.losses, plugin.skipped_steps, plugin.grad_norm, list(module.parameters())))
    for end in ends[1:]:
        assert end[:3] == ends[0][:3]
        torch.testing.assert_close(end[3], ends[0][3], rtol=0, atol=0)
