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
    assert "The loss is finite: the trouble is in backward, in the first of these modules" in said


def test_so_it_does_where_gradients_are_released() -> None:
    plugin = MasterWeightPrecision("bf16-true", gradient_release=True)
    plugin.warn_after_skips, plugin.error_after_skips = None, 3
    with pytest.raises(
        RuntimeError, match=r"Not finite now: net.0.weight, net.0.bias\..*net\.0 \(Linear\)\. The loss is f"
    ):
        fit(Classifier(net(SqrtOfZero())), classification(9), plugin)


def test_so_it_does_where_one_of_two_optimizers_only_skips() -> None:
    class Two(Classifier):
        automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, factor in zip(self.optimizers(), (float("nan"), 1.0), strict=True):  # type: ignore[arg-type]
                optimizer.zero_grad()
                self.manual_backward(super().training_step(batch, batch_idx) * factor)  # type: ignore[operator]
                optimizer.step()

    def configure(module: Any) -> Any:
        return [torch.optim.AdamW(module.net[index].parameters()) for index in (0, 3)]

    plugin = MasterWeightPrecision("bf16-true")
    plugin.warn_after_skips, plugin.error_after_skips = None, 5
    module = Two(net(nn.Identity()), configure)
    with pytest.raises(RuntimeError, match=r"5 steps in a row were skipped.*The loss is nan already"):
        fit(module, classification(9), plugin)
    assert len(module.losses) == 5 + 4


def test_a_run_that_only_skips_says_that_forward_is_why() -> None:
    plugin = MasterWeightPrecision("16-true", loss_scale=None)
    with (
        pytest.warns(UserWarning, match=r"net\.3 \(Linear\), net\.0 \(Linear\)\. The loss is nan already.*forward"),
        pytest.raises(
            RuntimeError, match="The loss is nan already: the trouble is in the forward pass, or in the data"
        ),
    ):
        fit(Classifier(net(Overflows())), classification(120), plugin)


class Climbs(Classifier):
    """One weight that AdamW moves up by 300 a step, from 300 under float16's largest number."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 1), adamw(lr=300.0, weight_decay=0.0))
        with torch.no_grad():
            self.net.weight.fill_(65_200.0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return (self.net.weight.float().sum() * 1e-3 - 1e3) ** 2 + self.net.bias.float().sum() * 0


@pytest.mark.parametrize("master_weights", ["split", "split8", "float32"])
def test_a_weight_that_leaves_float16s_range_is_named_once(master_weights: str) -> None:
    """After the second skipped step in a row, long before the loss scale is down, and not again at the end."""
    plugin = MasterWeightPrecision("16-true", master_weights=master_weights)
    (said,) = said_by(lambda: fit(Climbs(), classification(8), plugin))
    assert said.startswith(
        "net.weight became inf or NaN, and every step that this reaches is skipped. What passes 65504"
    )
    assert "'bf16-true'" in said
    assert plugin.skipped_steps == 6


def test_a_weight_that_leaves_it_in_the_last_step_is_named_where_it_is_lost() -> None:
    """FP32 masters still have it, and then nothing is."""
    for master_weights, lost in (("split", True), ("split8", True), ("float32", False)):
        module = Climbs()
        plugin = MasterWeightPrecision("16-true", master_weights=master_weights)
        said = said_by(lambda module=module, plugin=plugin: fit(module, classification(2), plugin))  # type: ignore[misc]
        assert [message.split()[0] for message in said] == ["net.weight"] * lost, master_weights
        assert bool(module.net.weight.isfinite()) != lost, master_weights


def test_in_bfloat16_it_just_goes_on() -> None:
    module = Climbs()
    assert said_by(lambda: fit(module, classification(4), MasterWeightPrecision("bf16-true"))) == []
    assert module.net.weight.item() == pytest.approx(65_200 + 4 * 300, rel=1e-5)


def test_a_stuck_run_names_lost_weights_as_the_cause() -> None:
    plugin = MasterWeightPrecision("16-true", loss_scale=None)
    plugin.error_after_skips = 5
    with (
        pytest.warns(UserWarning, match="net.weight became inf"),
        pytest.raises(RuntimeError, match=r"Weights hold inf or NaN themselves: net\.weight\. Go on from an earlier"),
    ):
        fit(Climbs(), classification(9), plugin)


class Unused(nn.Module):
    """Has an input that is always 0, so that one column of weights never has a gradient other than 0."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(torch.cat([x[:, :15], torch.zeros_like(x[:, :1])], dim=1))


@pytest.mark.parametrize("optimizer_state", ["float32", "bfloat16", "8bit"])
def test_an_eps_of_zero_makes_nan_of_weights_without_gradients_and_is_said_at_start(optimizer_state: str) -> None:
    fp32 = Classifier(Unused(), adamw(eps=0.0))
    fit(fp32, classification(1))
    assert fp32.net.net[0].weight[:, 15].isnan().all()  # as torch's own

    plugin = MasterWeightPrecision("bf16-true", optimizer_state=optimizer_state)
    eps, lost = said_by(lambda: fit(Classifier(Unused(), adamw(eps=0.0)), classification(4), plugin))
    assert eps.startswith("eps=0 is nothing in FP32: under tiny gradients weights leap")
    assert lost.startswith("net.net.0.weight")


@pytest.mark.parametrize("optimizer_state", ["float32", "bfloat16", "8bit"])
def test_an_eps_above_the_smallest_never_lets_a_weight_leap(optimizer_state: str) -> None:
    """The worst there is: gradients whose squares vanish in FP32. With a smaller eps they do let it."""
    for eps, leaps in ((SMALLEST_EPS, False), (SMALLEST_EPS / 2**20, True)):

        class Tiny(Classifier):
            def training_step(self, batch: Any, batch_idx: int) -> Tensor:
                return self.net.weight.float().sum() * 2.0**-75 + self.net.bias.float().sum()

        module = Tiny(nn.Linear(4, 4), adamw(lr=1e-3, eps=eps, weight_decay=0.0))
        start = module.net.weight.detach().clone()
        plugin = MasterWeightPrecision("bf16-true", optimizer_state=optimizer_state)
        said = said_by(lambda module=module, plugin=plugin: fit(module, classification(10), plugin))  # type: ignore[misc]
        assert bool(said) == leaps
        assert bool((module.net.weight - start).abs().max() > 10 * 1e-3 * 1.001) == leaps


def ones(lr: float, schedule: Callable[[Any], Any] | None = None) -> Classifier:
    """A network whose weights are about 1, or in its norm just 1."""

    def configure(module: Any) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=0.0)
        if schedule is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule(optimizer), "interval": "step"}}

    torch.manual_seed(0)
    module = Classifier(nn.Sequential(nn.LayerNorm(16, bias=False), nn.Linear(16, 4, bias=False)), configure)
    with torch.no_grad():
        module.net[1].weight.copy_(torch.randint(128, 256, (4, 16)) / 128)  # to the bit in every storage
    return module


STILL = 2.0**-26


@pytest.mark.parametrize(
    "options", [{}, {"master_weights": "split8", "optimizer_state": "8bit"}], ids=["exact", "compact"]
)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_learning_rate_under_which_no_weight_moves_is_said(precision: Any, options: dict[str, Any]) -> None:
    """In FP32 none does either; under 64 times as much they do, in every storage, and nothing is said."""
    for lr, plugin in ((STILL, None), (STILL, MasterWeightPrecision(precision, loss_scale=64.0, **options))):
        module = ones(lr)
        start = [parameter.detach().clone() for parameter in module.parameters()]
        said = said_by(lambda module=module, plugin=plugin: fit(module, classification(20), plugin))  # type: ignore[misc]
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), start, strict=True))
        assert len(said) == (plugin is not None)
        if said:
            assert said[0].startswith("lr=1.49012e-08 is too small to move most weights of net.0.weight, net.1.weight")
    module = ones(64 * STILL)
    fit(module, classification(20), MasterWeightPrecision(precision, loss_scale=64.0, **options))
    assert not any(torch.equal(a, b) for a, b in zip(module.parameters(), start, strict=True))


@pytest.mark.parametrize(
    "configure",
    [
        lambda optimizer: LinearLR(optimizer, 1e-3, 1.0, total_iters=10),
        lambda optimizer: LambdaLR(optimizer, lambda step: 1e6 * step),
        lambda optimizer: OneCycleLR(optimizer, max_lr=1e-2, total_steps=100),
    ],
    ids=["linear", "lambda", "one cycle"],
)
def test_a_schedule_from_next_to_nothing_is_as_it_should_be(configure: Callable[[Any], Any]) -> None:
    assert said_by(lambda: fit(ones(STILL, configure), classification(2), MasterWeightPrecision("bf16-true"))) == []


HARMLESS: dict[str, Configure] = {
    "lr of 0": adamw(lr=0.0),
    "small lr": adamw(lr=1e-6),
    "frozen": lambda module: torch.optim.AdamW(module.net.requires_grad_(False).parameters(), lr=STILL),
    "sgd": lambda module: torch.optim.SGD(module.parameters(), lr=STILL),
    "small eps": adamw(eps=1e-16),
}


@pytest.mark.parametrize("configure", HARMLESS.values(), ids=HARMLESS)
def test_no_false_alarm(configure: Configure) -> None:
    class Trains(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + torch.zeros((), requires_grad=True)  # type: ignore[operator]

    assert said_by(lambda: fit(Trains(mlp(), configure), classification(3), MasterWeightPrecision("bf16-true"))) == []


@pytest.mark.parametrize("precision", PRECISIONS)
def test_nan_at_start_is_refused_by_name_also_in_what_stays_fp32(precision: Any) -> None:
    module = Classifier(nn.Sequential(nn.Linear(16, 4), nn.BatchNorm1d(4)))
    with torch.no_grad():
        module.net[1].weight[2] = float("nan")
    with pytest.raises(ValueError, match=r"net\.1\.weight holds inf or NaN before the first step"):
        fit(module, classification(1), MasterWeightPrecision(precision))


def test_norms_that_other_fp32_modules_leave_out_are_named_once() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.LayerNorm(8), nn.BatchNorm1d(8), nn.Linear(8, 4))

    said = r"fp32_modules=\(LayerNorm,\) takes the place of .* 2 of them \(net\.1, BatchNorm1d, first\) train in half"
    with pytest.warns(UserWarning, match=said):
        fit(Classifier(net()), classification(2), MasterWeightPrecision("bf16-true", fp32_modules=nn.LayerNorm))
    # All meant: nothing is said, which would be an error here.
    for kept in (None, (), (nn.LayerNorm, nn.BatchNorm1d), nn.modules.batchnorm._BatchNorm):
        fit(Classifier(net()), classification(2), MasterWeightPrecision("bf16-true", fp32_modules=kept))
