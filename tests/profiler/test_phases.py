"""The phase `clip`: by hand and in a Trainer, between backward and the optimizer's step."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_mpt import MasterWeightPrecision
from lightning_mpt.profiler import Category, MemoryRecorder

from .loops import mlp
from .test_lightning import Classifier, fit

FOUR = ["forward", "backward", "clip", "optimizer_step"]


class Clipping(Classifier):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        nn.utils.clip_grad_value_(self.parameters(), 0.1)


def test_clipping_is_a_phase_of_its_own_when_the_loop_says_so() -> None:
    loop = mlp()
    with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=1) as recorder:
        for _ in range(2):
            recorder.phase("forward")
            loss = loop.module(torch.randn(8, 64)).square().mean()
            recorder.phase("backward")
            loss.backward()
            recorder.phase("clip")
            copies = [parameter.grad.clone() for parameter in loop.module.parameters()]
            loop.optimizer.step()  # ends the phase
            del copies
            loop.optimizer.zero_grad()
            recorder.step()
    report = recorder.report
    assert list(report.phases) == FOUR
    assert report.phases["clip"].categories[Category.TEMPORARIES] == 4 * report.parameters
    assert report.phases["clip"].categories[Category.GRADIENTS] == 4 * report.parameters


def test_another_phase_is_refused() -> None:
    loop = mlp()
    with MemoryRecorder(loop.module) as recorder, pytest.raises(ValueError, match="'warmup' is not one of forward, "):
        recorder.phase("warmup")
    MemoryRecorder(loop.module).phase("clip")  # outside of the steps it says nothing


@pytest.mark.parametrize("plugin", [False, True])
def test_a_trainer_that_clips_has_the_phase(plugin: bool, tmp_path: Any) -> None:
    options: dict[str, Any] = {"plugins": [MasterWeightPrecision("bf16-true")]} if plugin else {}
    report = fit(Classifier(), tmp_path, gradient_clip_val=0.5, **options).profiler.report
    assert list(report.phases) == FOUR
    assert report.phases["clip"].categories[Category.GRADIENTS] == (2 if plugin else 4) * report.parameters
    assert report.phases["clip"].categories[Category.UNATTRIBUTED] < 64


@pytest.mark.parametrize(("module", "phases"), [(Clipping, FOUR), (Classifier, ["forward", "backward", FOUR[3]])])
def test_a_module_that_clips_by_itself_has_it_and_one_that_does_not_has_not(
    module: type[L.LightningModule], phases: list[str], tmp_path: Any
) -> None:
    assert list(fit(module(), tmp_path).profiler.report.phases) == phases
