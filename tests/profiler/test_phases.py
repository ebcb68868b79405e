"""The phase `clip`: by hand and in a Trainer, between backward and the optimizer's step."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_mpt import MasterWeightPrecision
from lightning_mpt.profiler import Category, MemoryRecorder, MemoryReport

from .loops import Loop, mlp, record
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


def penalty(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The loss of a gradient penalty, with more to compute after `torch.autograd.grad` than before, by no module."""
    (gradient,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
    for _ in range(12):
        gradient = gradient.tanh() * 1.1
    return gradient.square().mean()


def assert_the_penalty_is_forward(report: MemoryReport) -> None:
    assert list(report.phases) == ["forward", "backward", "optimizer_step"]
    assert report.phases["forward"].categories[Category.ACTIVATIONS] >= 12 * 512 * 64 * 4
    step = report.phases["optimizer_step"].categories
    assert step[Category.ACTIVATIONS] == 0
    assert step[Category.GRADIENTS] >= 4 * report.parameters


def test_forward_goes_on_after_a_gradient_that_no_parameter_is_given() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 16), nn.Softplus(), nn.Linear(16, 1))

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        return penalty(model, torch.randn(512, 64, generator=generator).requires_grad_())

    assert_the_penalty_is_forward(record(Loop(module, loss)))


class Penalized(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return penalty(self.net, batch[0].repeat(16, 1).requires_grad_())


def test_forward_goes_on_in_a_trainer_too(tmp_path: Any) -> None:
    assert_the_penalty_is_forward(fit(Penalized(), tmp_path).profiler.report)


def test_the_optimizers_step_begins_with_it_where_gradients_are_set_by_hand() -> None:
    loop = mlp()
    parameters = list(loop.module.parameters())
    with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=1) as recorder:
        for _ in range(3):
            gradients = torch.autograd.grad(loop.module(torch.randn(8, 64)).square().mean(), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            del gradient, gradients
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            recorder.step()
    step = recorder.report.phases["optimizer_step"].categories
    assert step[Category.GRADIENTS] == 4 * recorder.report.parameters
    assert step[Category.UNATTRIBUTED] <= 64
    assert step[Category.OPTIMIZER_STATE] >= 8 * recorder.report.parameters
    assert step[Category.ACTIVATIONS] == 0


def test_what_is_made_after_the_penalty_is_not_taken_for_the_batch() -> None:
    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        x = torch.randn(512, 64, generator=generator).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        mask = torch.rand(512, 64, generator=generator)
        return model(gradient * mask).square().mean()

    module = nn.Sequential(nn.Linear(64, 16), nn.Softplus(), nn.Linear(16, 1))
    report = record(Loop(module, loss))
    assert report.phases["forward"].categories[Category.INPUTS] == 512 * 64 * 4
