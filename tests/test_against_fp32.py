"""Ways to use the Trainer and its callbacks, each against the same run in FP32."""

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import Classifier, Sized, Validated, classification, convnet, fit, loader, mlp, trainer

from lightning_mpt import MasterWeightPrecision

DISTANCE = 0.2
"""Of the way that FP32 training has gone. AdamW's first steps go by the sign of a gradient, which rounding can change.

Worst seen: 0.151 in bf16 (thawed in mid-run), 0.147 in fp16 (the same; 0.024 elsewhere).
"""
OUTPUTS = {"16-true": 2**-8, "bf16-true": 2**-5}
"""Logits of a few units: worst seen 0.0015 and 0.0162."""
PRECISIONS = ("16-true", "bf16-true")


def plugin_of(precision: str | None) -> MasterWeightPrecision | None:
    return None if precision is None else MasterWeightPrecision(precision)


def fit_twice(precision: str | None) -> nn.Module:
    module = Classifier(mlp())
    ours = fit(module, classification(10), plugin_of(precision))
    ours.fit_loop.max_epochs = 3
    ours.fit(module, loader(classification(10)))
    assert len(module.losses) == 30
    return module


def fit_after_the_batch_size_was_found(precision: str | None) -> nn.Module:
    module = Sized(mlp())
    ours = trainer(plugin_of(precision), max_epochs=5)
    assert Tuner(ours).scale_batch_size(module, init_val=8, steps_per_trial=1) == 16
    ours.fit(module)
    assert ours.global_step == 20
    return module


def fit_with_limits(precision: str | None) -> nn.Module:
    module = Validated(mlp())
    limits = {"limit_train_batches": 7, "limit_val_batches": 2, "val_check_interval": 3}
    ours = trainer(plugin_of(precision), max_epochs=3, num_sanity_val_steps=0, **limits)
    ours.fit(module, loader(classification(20)), loader(classification(5)))
    assert ours.global_step == 21
    return module


def fit_checkpointed(precision: str | None) -> nn.Module:
    class Checkpointed(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    module = Checkpointed(mlp())
    fit(module, classification(20), plugin_of(precision))
    return module


def fit_compiled(precision: str | None) -> nn.Module:
    module = Classifier(torch.compile(mlp(), backend="aot_eager"))
    fit(module, classification(20), plugin_of(precision))
    return module


def fit_and_thaw(precision: str | None) -> nn.Module:
    class Backboned(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Identity(), lambda module: torch.optim.AdamW(module.head.parameters(), lr=1e-2))
            self.backbone, self.head = mlp(classes=16), mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.backbone(x))

    module = Backboned()
    thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=1e-3)
    fit(module, classification(10), plugin_of(precision), max_epochs=3, callbacks=[thaw])
    return module


def fit_by_hand(optimizer: Callable[[Any], torch.optim.Optimizer]) -> Callable[[str | None], nn.Module]:
    """A step for every fourth batch, clipped by norm."""

    class ByHand(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = super().training_step(batch, batch_idx)
            self.manual_backward(loss / 4)
            if (batch_idx + 1) % 4 == 0:
                self.clip_gradients(self.optimizers(), gradient_clip_val=0.3, gradient_clip_algorithm="norm")
                self.optimizers().step()
                self.optimizers().zero_grad()

    def by_hand(precision: str | None) -> nn.Module:
        module = ByHand(mlp(), lambda module: optimizer(module.parameters()))
        fit(module, classification(40), plugin_of(precision))
        return module

    return by_hand


def fit_and_average(callback: Callable[[], L.Callback]) -> Callable[[str | None], nn.Module]:
    def average(precision: str | None) -> nn.Module:
        module = Classifier(mlp())
        fit(module, classification(5), plugin_of(precision), max_epochs=5, callbacks=[callback()])
        return module

    return average


RUNS = {
    "fit twice": fit_twice,
    "after scale_batch_size": fit_after_the_batch_size_was_found,
    "limits": fit_with_limits,
    "checkpointed": fit_checkpointed,
    "compiled": fit_compiled,
    "thawed in mid-run": fit_and_thaw,
    "by hand": fit_by_hand(lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)),
    "by hand, SGD": fit_by_hand(lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9)),
    "SWA": fit_and_average(lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)),
    "EMA": fit_and_average(lambda: EMAWeightAveraging(decay=0.9)),
}


def values(module: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in module.state_dict().values() if value.is_floating_point()])


def start_of(name: str) -> Tensor:
    parts = [mlp(classes=16), mlp()] if name == "thawed in mid-run" else [mlp()]
    return torch.cat([values(part) for part in parts])


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_ends_where_fp32_does(name: str, precision: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the Tuner puts its file
    start, fp32, ours = start_of(name), values(RUNS[name](None)), values(RUNS[name](precision))
    assert ours.dtype == torch.float32
    distance = ((ours - fp32).norm() / (fp32 - start).norm()).item()
    print(f"{name} in {precision}: {distance:.4f}")
    assert distance <= DISTANCE


@pytest.mark.parametrize("precision", PRECISIONS)
def test_checkpointing_changes_nothing(precision: str) -> None:
    plain = Classifier(mlp())
    fit(plain, classification(20), plugin_of(precision))
    assert torch.equal(values(fit_checkpointed(precision)), values(plain))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_validate_test_and_predict_give_is_fp32s_rounded(precision: str) -> None:
    class Tells(Validated):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            outputs.append(self(batch[0]))

        test_step = validation_step

        def predict_step(self, batch: Any) -> Tensor:
            return self(batch[0])

    outputs: list[Tensor] = []
    trained = Tells(convnet())
    trainer().fit(trained, loader(classification(10)), loader(classification(1)))
    found = []
    for given in (None, precision):
        module = copy.deepcopy(trained)
        outputs.clear()
        limits = {"limit_val_batches": 2, "limit_test_batches": 1, "limit_predict_batches": 1}
        ours = trainer(plugin_of(given), **limits)
        ours.validate(module, loader(classification(3)), verbose=False)
        ours.test(module, loader(classification(3)), verbose=False)
        outputs += ours.predict(module, loader(classification(3))) or []
        assert len(outputs) == 4
        found.append([output.float() for output in outputs])
    worst = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    print(f"outputs in {precision}: {worst:.4f}")
    assert worst <= OUTPUTS[precision]
