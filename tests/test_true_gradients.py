"""Whoever looks at a gradient between backward and the step sees the true one, and what is done to it holds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import grad_norm
from torch import Tensor, nn
from training import Classifier, classification, fit

from lightning_mpt import DynamicLossScale, MasterWeightPrecision

SCALED = [("16-true", 1024.0), ("16-true", "dynamic"), ("bf16-true", None), ("bf16-true", 512.0)]
HALF_ERROR = {"16-true": 0.001, "bf16-true": 0.01}
"""Of a gradient whose forward and backward were half; worst seen 0.00015 and 0.0011."""


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))


def sgd(module: Any) -> torch.optim.Optimizer:
    """With it, a step is the gradient itself."""
    return torch.optim.SGD(module.parameters(), lr=1.0)


class Steps(Classifier):
    """Does something to gradients before the step, and knows how far the step went."""

    def __init__(self, change: Callable[["Steps"], None] = lambda module: None) -> None:
        super().__init__(net(), sgd)
        self._change = change
        self._start = [p.detach().clone() for p in self.parameters()]

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._change(self)

    def ways(self) -> list[Tensor]:
        return [start - p.detach() for start, p in zip(self._start, self.parameters(), strict=True)]


@pytest.mark.parametrize(("precision", "scale"), SCALED)
def test_lightnings_grad_norm_is_that_of_fp32_and_asking_changes_nothing(precision: Any, scale: Any) -> None:
    norms: list[dict[str, float]] = []
    ways = []
    for plugin, change in (
        (None, lambda module: norms.append(grad_norm(module, 2))),
        (MasterWeightPrecision(precision, loss_scale=scale), lambda module: norms.append(grad_norm(module, 2))),
        (MasterWeightPrecision(precision, loss_scale=scale), lambda module: None),
    ):
        module = Steps(change)
        fit(module, classification(1), plugin)
        ways.append(module.ways())
    expected, ours = norms
    assert len(expected) == 5 + 1
    assert {name: float(norm) for name, norm in ours.items()} == pytest.approx(
        {name: float(norm) for name, norm in expected.items()}, rel=HALF_ERROR[precision], abs=1e-6
    )
    torch.testing.assert_close(ways[1], ways[2], rtol=0, atol=0)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_gradient_is_true_in_the_hooks_and_half_before_and_after(accumulated: int) -> None:
    class Looks(Steps):
        def on_after_backward(self) -> None:
            before.append(self.net[0].weight.grad.clone())

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            true.append(self.net[0].weight.grad)
            assert self.net[0].weight.grad is true[-1]

        def on_train_batch_end(self, *_: Any) -> None:
            after.append(self.net[0].weight.grad)

    before: list[Tensor] = []
    true: list[Tensor] = []
    after: list[Tensor] = []
    module = Looks()
    fit(
        module,
        classification(2),
        MasterWeightPrecision("16-true", loss_scale=256.0),
        accumulate_grad_batches=accumulated,
    )
    assert true[0].dtype == torch.float32
    scaled = before[accumulated - 1]
    assert scaled.dtype == (torch.float16 if accumulated == 1 else torch.float32)
    torch.testing.assert_close(true[0] * 256.0, scaled.float(), rtol=0, atol=0)
    torch.testing.assert_close(after[accumulated - 1], scaled, rtol=0, atol=0)


def halve_in_place(module: Steps) -> None:
    for p in module.parameters():
        p.grad.mul_(0.5)  # type: ignore[union-attr]


def halve_data(module: Steps) -> None:
    for p in module.parameters():
        p.grad.data.mul_(0.5)  # type: ignore[union-attr]


def halve_by_assignment(module: Steps) -> None:
    for p in module.parameters():
        p.grad = p.grad * 0.5  # type: ignore[operator]


def halve_in_half(module: Steps) -> None:
    for p in module.parameters():
        p.grad = (p.grad * 0.5).to(p.dtype)  # type: ignore[operator]


def halve_through_a_view(module: Steps) -> None:
    for p in module.parameters():
        p.grad.view(-1)[:].mul_(0.5)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "change",
    [halve_in_place, halve_data, halve_by_assignment, halve_in_half, halve_through_a_view],
    ids=lambda f: f.__name__,
)
def test_what_is_done_to_a_gradient_holds(change: Callable[[Steps], None]) -> None:
    plain, changed = Steps(), Steps(change)
    for module in (plain, changed):
        fit(module, classification(1), MasterWeightPrecision("16-true", loss_scale=1024.0))
    torch.testing.assert_close([2 * way for way in changed.ways()], plain.ways(), rtol=1e-3, atol=1e-6)


def test_a_gradient_that_is_taken_away_is_no_gradient() -> None:
    def take(module: Steps) -> None:
        module.net[0].weight.grad = None
        del module.net[3].weight.grad

    module = Steps(take)
    fit(module, classification(1), MasterWeightPrecision("16-true", loss_scale=1024.0))
    moved = {name for (name, _), way in zip(module.named_parameters(), module.ways(), strict=True) if way.any()}
    assert {"net.0.weight", "net.3.weight"} == {name for name, _ in module.named_parameters()} - moved


@pytest.mark.parametrize("by", ["torch", "lightning"])
def test_clipping_of_ones_own_is_clipping_of_true_gradients(by: str) -> None:
    class Clips(Steps):
        def configure_gradient_clipping(
            self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
        ) -> None:
            if by == "torch":
                norms.append(nn.utils.clip_grad_norm_(self.parameters(), 0.25).item())
            else:
                self.clip_gradients(optimizer, gradient_clip_val=0.25, gradient_clip_algorithm="norm")

    norms: list[float] = []
    module = Clips()
    plugin = MasterWeightPrecision("16-true", loss_scale=1024.0)
    fit(module, classification(1), plugin)
    assert torch.cat([way.flatten() for way in module.ways()]).norm().item() == pytest.approx(0.25, rel=1e-4)
    assert norms == [] or norms[0] > 0.25


def test_in_manual_optimization_one_asks_for_true_gradients() -> None:
    class Manual(Steps):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            self.manual_backward(loss)
            with plugin.true_gradients():
                nn.utils.clip_grad_norm_(self.parameters(), 0.25)
                with plugin.true_gradients():  # a helper of the user's may ask again
                    norms.append(grad_norm(self, 2)["grad_2.0_norm_total"])
            self.optimizers().step()  # type: ignore[union-attr]

    norms: list[float] = []
    module = Manual()
    plugin = MasterWeightPrecision("16-true", loss_scale=1024.0)
    fit(module, classification(1), plugin)
    assert float(norms[0]) == pytest.approx(0.25, rel=1e-4)
    assert torch.cat([way.flatten() for way in module.ways()]).norm().item() == pytest.approx(0.25, rel=1e-4)


def test_outside_of_training_there_are_none_to_ask_for() -> None:
    with (
        pytest.raises(RuntimeError, match=r"trains no module now.*ask during fit"),
        MasterWeightPrecision().true_gradients(),
    ):
        pass


def repair(module: Steps) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            torch.nan_to_num(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0, out=parameter.grad)


def clip(module: Steps) -> None:
    torch.nn.utils.clip_grad_value_(module.parameters(), 1.0)


def assign(module: Steps) -> None:
    for parameter in module.parameters():
        if parameter.grad is not None:
            parameter.grad = torch.nan_to_num(parameter.grad)


@pytest.mark.parametrize("change", [repair, clip, assign])
def test_a_gradient_that_overflowed_skips_the_step_whatever_is_made_of_it(change: Callable[[Steps], None]) -> None:
    plugin = MasterWeightPrecision("16-true", loss_scale=DynamicLossScale(init_scale=2.0**24))
    module = Steps(change)
    fit(module, classification(1), plugin)
    assert (plugin.skipped_steps, plugin.loss_scale) == (1, 2.0**23)
    assert not any(way.any() for way in module.ways())


def test_without_a_loss_scale_what_is_repaired_is_taken_as_in_fp32() -> None:
    def spoil_and_repair(module: Steps) -> None:
        module.net[0].weight.grad.view(-1)[0] = torch.inf  # type: ignore[union-attr, operator]
        repair(module)

    plugin, module = MasterWeightPrecision("bf16-true"), Steps(spoil_and_repair)
    fit(module, classification(1), plugin)
    assert plugin.skipped_steps == 0
    assert all(way.any() for way in module.ways())


class ByHand(Classifier):
    """Goes backward in its own way."""

    def __init__(self, backward: Callable[["ByHand", Tensor], None]) -> None:
        super().__init__(net(), sgd)
        self.automatic_optimization = False
        self._backward = backward

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self._backward(self, F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


def test_a_loss_that_goes_backward_unscaled_is_an_error() -> None:
    with pytest.raises(RuntimeError, match=r"loss scale of 1024, and .* call self.manual_backward\(loss\)"):
        fit(
            ByHand(lambda _, loss: loss.backward()),
            classification(1),
            MasterWeightPrecision("16-true", loss_scale=1024),
        )
    fit(ByHand(lambda _, loss: loss.backward()), classification(1), MasterWeightPrecision("bf16-true"))


def test_gradients_that_are_assigned_need_no_backward() -> None:
    def evolve(module: ByHand, loss: Tensor) -> None:
        with module.trainer.precision_plugin.true_gradients():  # type: ignore[attr-defined]
            for parameter in module.parameters():
                parameter.grad = torch.full(parameter.shape, 0.25)

    module = ByHand(evolve)
    start = [parameter.detach().clone() for parameter in module.parameters()]
    fit(module, classification(1), MasterWeightPrecision("16-true"))
    for before, after in zip(start, module.parameters(), strict=True):
        torch.testing.assert_close(before - after, torch.full_like(before, 0.25), rtol=1e-3, atol=1e-6)
