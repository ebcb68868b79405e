"""The plugin in real Trainers: what is half when, what a skipped step leaves alone, and what comes back."""

import copy
import itertools
import pickle
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loops.optimization.automatic import Closure
from lightning.pytorch.utilities.rank_zero import WarningCache
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from training import Classifier, classification, convnet, fit, loader, mlp, trainer

from lightning_mpt import PRESETS, DynamicLossScale, MasterWeightPrecision

HALVES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}


class Watched(Classifier):
    """Notes the dtypes that it sees while it trains."""

    def __init__(self, net: nn.Module, **options: Any) -> None:
        super().__init__(net, **options)
        self.register_buffer("table", torch.linspace(0, 1, 7))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.seen: dict[str, Any] = {}

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        matmul = torch.backends.cuda.matmul
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        self.seen = {
            "batch": batch[0].dtype,
            "labels": batch[1].dtype,
            "weights": {name: parameter.dtype for name, parameter in self.net.named_parameters()},
            "output": self(batch[0]).dtype,
            "table": self.table.dtype,
            "count": self.count.dtype,
            "loss": loss.dtype,
            "new": torch.zeros(1).dtype,
            "reduced": (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction),
            "accumulation": matmul.allow_fp16_accumulation,
            "sdp": torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
        }
        return loss

    def on_after_backward(self) -> None:
        self.seen["gradients"] = {name: p.grad.dtype for name, p in self.net.named_parameters() if p.grad is not None}


@pytest.fixture
def _reduced_precision_allowed() -> Any:
    """Both switches on, as torch has them, and afterwards whatever they were."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = [getattr(matmul, name) for name in names]
    for name in names:
        setattr(matmul, name, True)
    yield
    for name, value in zip(names, before, strict=True):
        setattr(matmul, name, value)


def global_state() -> dict[str, Any]:
    matmul = torch.backends.cuda.matmul
    return {
        "default dtype": torch.get_default_dtype(),
        "fp16": matmul.allow_fp16_reduced_precision_reduction,
        "bf16": matmul.allow_bf16_reduced_precision_reduction,
        "accumulation": matmul.allow_fp16_accumulation,
        "sdp": torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
        "torch function modes": torch._C._len_torch_function_stack(),
        "grad": torch.is_grad_enabled(),
    }


@pytest.mark.usefixtures("_reduced_precision_allowed")
@pytest.mark.parametrize("precision", HALVES)
def test_inside_fit_all_is_half_but_batchnorm_and_the_loss(precision: str) -> None:
    half = HALVES[precision]
    module = Watched(convnet())
    fit(module, classification(3), MasterWeightPrecision(precision))  # type: ignore[arg-type]
    seen = module.seen
    assert seen["batch"] == seen["output"] == seen["table"] == seen["new"] == half
    assert seen["labels"] == seen["count"] == torch.int64
    assert seen["loss"] == torch.float32
    for dtypes in (seen["weights"], seen["gradients"]):
        assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"2.weight", "2.bias"}
        assert {dtype for name, dtype in dtypes.items() if not name.startswith("2.")} == {half}
    assert seen["reduced"] == (False, False)
    assert not seen["accumulation"]
    assert not seen["sdp"]


@pytest.mark.parametrize("precision", HALVES)
def test_after_fit_the_same_parameters_are_fp32_and_nothing_is_left_behind(precision: str) -> None:
    module = Watched(convnet())
    before, table = list(module.parameters()), module.table.clone()
    state = global_state()
    ours = fit(module, classification(3), MasterWeightPrecision(precision))  # type: ignore[arg-type]
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert torch.equal(module.table, table)
    assert all(parameter.grad is None or parameter.grad.dtype == torch.float32 for parameter in before)
    assert type(ours.optimizers[0]) is torch.optim.AdamW
    for part in module.modules():
        assert not part._forward_hooks
        assert not part._forward_pre_hooks
        assert not part._state_dict_hooks
        assert not part._load_state_dict_pre_hooks
        assert not part._load_state_dict_post_hooks
    assert not any("Metrics" in type(callback).__name__ for callback in ours.callbacks)  # type: ignore[attr-defined]
    assert global_state() == state
    module(torch.randn(2, 16)).sum().backward()
    ours.optimizers[0].step()  # an ordinary FP32 AdamW, with its state


class Fails(Watched):
    """Raises in its second step, where it is told to."""

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__(convnet())
        self._where, self._error = where, error

    def _maybe(self, where: str) -> None:
        if where == self._where and self.trainer.global_step >= 1:
            raise self._error

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._maybe("forward")
        return super().training_step(batch, batch_idx)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        self._maybe("backward")
        super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self._maybe("step")

    def on_train_batch_end(self, *args: Any) -> None:
        self._maybe("batch end")

    def configure_optimizers(self) -> Any:
        if self._where == "configure":
            raise self._error
        return super().configure_optimizers()


@pytest.mark.parametrize("where", ["configure", "forward", "backward", "step", "batch end"])
@pytest.mark.parametrize(
    ("error", "seen"),
    [(ArithmeticError("x"), ArithmeticError), (KeyboardInterrupt(), SystemExit)],
    ids=["error", "ctrl-c"],
)
def test_after_an_exception_nothing_stays_on(where: str, error: BaseException, seen: type[BaseException]) -> None:
    module, state = Fails(where, error), global_state()
    start = copy.deepcopy(dict(module.named_parameters()))
    plugin = MasterWeightPrecision("16-true")
    with pytest.raises(seen):
        fit(module, classification(4), plugin)
    assert global_state() == state
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    moved = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, start[name])}
    assert bool(moved) == (where != "configure")
    fit(Classifier(mlp()), classification(2), plugin)  # the plugin is free again


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("master_weights", ["split", "float32"])
def test_frozen_tied_and_unused_parameters(precision: str, master_weights: str) -> None:
    class Odd(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp())
            self.net[4].weight = nn.Parameter(torch.randn(4, 64) / 8)
            self.tied = nn.Linear(64, 4)
            self.tied.weight = self.net[4].weight
            self.frozen = nn.Linear(4, 4).requires_grad_(False)
            self.unused = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(self.net(x)) + self.net[4].bias

    module = Odd()
    start = copy.deepcopy(dict(module.named_parameters()))
    fit(module, classification(3), MasterWeightPrecision(precision, master_weights=master_weights))  # type: ignore[arg-type]
    assert module.tied.weight is module.net[4].weight
    for name, parameter in module.named_parameters():
        same = torch.equal(parameter, start[name])
        assert same == name.startswith(("frozen", "unused", "tied.bias")), name


@pytest.mark.parametrize("precision", HALVES)
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(precision: str) -> None:
    """Weights, masters, moments, step counts and the schedule stay, bit for bit; the scale and the counter move."""

    class Breaks(Classifier):
        def __init__(self) -> None:
            super().__init__(mlp(), self._configure_with_schedule)
            self.snapshots: list[Any] = []

        @staticmethod
        def _configure_with_schedule(module: L.LightningModule) -> Any:
            optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
            schedule = LinearLR(optimizer, 1.0, 0.1, total_iters=10)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if self.trainer.global_step in (2, 3):
                next(self.parameters()).grad.view(-1)[5] = float("nan")  # type: ignore[union-attr]

        def on_train_batch_end(self, *_: Any) -> None:
            plugin, optimizer = self.trainer.precision_plugin, self.trainer.optimizers[0]
            assert isinstance(plugin, MasterWeightPrecision)
            everything = {
                "weights": [p.detach().clone() for p in self.parameters()],
                "masters": [m.clone() for m in plugin.master_params(optimizer)],
                "state": copy.deepcopy(optimizer.state_dict()["state"]),
                "lr": optimizer.param_groups[0]["lr"],
                "schedule": self.trainer.lr_scheduler_configs[0].scheduler.last_epoch,
            }
            self.snapshots.append((everything, plugin.skipped_steps, plugin.loss_scale, self.trainer.global_step))

    module = Breaks()
    plugin = MasterWeightPrecision(precision, loss_scale="dynamic")  # type: ignore[arg-type]
    fit(module, classification(6), plugin)
    everything, skipped, scales, global_steps = zip(*module.snapshots, strict=True)
    assert skipped == (0, 0, 1, 2, 2, 2)
    assert scales == tuple(2.0**15 / 2**n for n in skipped)
    assert global_steps == (1, 2, 3, 4, 5, 6)  # as under 16-mixed
    assert [snapshot["schedule"] for snapshot in everything] == [1, 2, 2, 2, 3, 4]
    for name in ("weights", "masters", "state", "lr"):
        torch.testing.assert_close(everything[2][name], everything[1][name], rtol=0, atol=0)
        torch.testing.assert_close(everything[3][name], everything[1][name], rtol=0, atol=0)
    assert not torch.equal(everything[4]["masters"][0], everything[3]["masters"][0])


def test_the_scales_of_a_run_are_those_of_gradscaler_over_the_same_overflows() -> None:
    overflows = [i % 7 == 3 or i in (20, 21, 22) for i in range(40)]

    class Overflows(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            if overflows[self.trainer.global_step]:
                next(self.parameters()).grad.fill_(float("inf"))  # type: ignore[union-attr]

        def on_train_batch_end(self, *_: Any) -> None:
            scales.append(self.trainer.precision_plugin.loss_scale)  # type: ignore[attr-defined]

    scales: list[float] = []
    scale = DynamicLossScale(init_scale=256.0, growth_interval=3)
    fit(Overflows(mlp()), classification(40), MasterWeightPrecision("16-true", loss_scale=scale))

    theirs = []
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=3)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)
    for overflow in overflows:
        scaler.scale(weight.sum()).backward()
        weight.grad = torch.tensor([float("inf") if overflow else 1.0])
        scaler.step(optimizer)
        scaler.update()
        theirs.append(scaler.get_scale())
    assert scales == theirs
    assert len(set(scales)) > 3


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
        lambda p: torch.optim.Adagrad(p, lr=0.05),
        lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True),
        lambda p: torch.optim.NAdam(p, lr=1e-2),
        lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=1e-2, maximize=False, foreach=True),
    ],
    ids=["sgd", "adagrad", "rmsprop", "nadam", "adam", "adamw"],
)
@pytest.mark.parametrize("precision", HALVES)
def test_every_optimizer_learns_as_in_fp32(optimizer: Any, precision: str) -> None:
    finals = []
    for plugin in (None, MasterWeightPrecision(precision)):  # type: ignore[arg-type]
        module = Classifier(mlp(), lambda module: optimizer(module.parameters()))
        fit(module, classification(60), plugin)
        finals.append(sum(module.losses[-10:]) / 10)
        assert finals[-1] < 0.6 * module.losses[0]
    assert finals[1] == pytest.approx(finals[0], rel=0.1)  # worst seen 0.07


def test_a_training_step_of_none_changes_nothing_and_counts_as_no_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Closure, "warning_cache", WarningCache())  # Lightning warns once a process

    class Sometimes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

        def on_train_batch_end(self, *_: Any) -> None:
            ends.append(next(self.parameters()).detach().clone())

    ends: list[Tensor] = []
    plugin = MasterWeightPrecision("16-true", loss_scale=DynamicLossScale(growth_interval=3))
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit(Sometimes(mlp()), classification(4), plugin)
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[2], ends[3])
    assert not torch.equal(ends[1], ends[2])
    assert plugin.loss_scale == 2.0**15  # two clean steps, not four


def test_manual_optimization_with_two_optimizers() -> None:
    class Adversaries(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.a, self.b = mlp(), mlp()

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for optimizer, net in zip(self.optimizers(), (self.a, self.b), strict=True):  # type: ignore[arg-type]
                self.toggle_optimizer(optimizer)
                loss = F.cross_entropy(net(batch[0]), batch[1])
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
                optimizer.step()
                self.untoggle_optimizer(optimizer)
            losses.append(loss.item())
            masters = self.trainer.precision_plugin.master_params(self.optimizers()[0])  # type: ignore
            assert [m.dtype for m in masters] == [torch.float32] * 6

        def configure_optimizers(self) -> Any:
            return [torch.optim.AdamW(self.a.parameters(), lr=1e-2), torch.optim.SGD(self.b.parameters(), lr=0.5)]

    losses: list[float] = []
    fit(Adversaries(), classification(40), MasterWeightPrecision("16-true"))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", HALVES)
def test_every_preset_learns_as_in_fp32(preset: str, precision: Any) -> None:
    fp32 = Classifier(mlp())
    fit(fp32, classification(60))
    scale = 1024.0 if precision == "16-true" else None
    module = Classifier(mlp())
    fit(module, classification(60), MasterWeightPrecision(precision, loss_scale=scale, **PRESETS[preset]))
    assert sum(module.losses[-10:]) == pytest.approx(sum(fp32.losses[-10:]), rel=0.1)
    assert fp32.losses[-1] < 0.7 * fp32.losses[0]


@pytest.mark.parametrize("autocast", [False, True])
def test_modules_may_mix_types(autocast: bool) -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.float() * 2)  # FP32 into half weights

    module = Classifier(Mixes())
    fit(module, classification(40), MasterWeightPrecision("bf16-true", autocast=autocast))
    assert module.losses[-1] < 0.7 * module.losses[0]


def test_named_module_types_stay_fp32_and_their_neighbours_see_half() -> None:
    module = Watched(convnet())
    fit(module, classification(2), MasterWeightPrecision("bf16-true", fp32_modules=[nn.BatchNorm2d, nn.LayerNorm]))
    fp32 = {name for name, dtype in module.seen["weights"].items() if dtype == torch.float32}
    assert fp32 == {"2.weight", "2.bias", "5.weight", "5.bias"}
    assert module.seen["output"] == torch.bfloat16


def test_every_combination_of_storages_and_scales_learns() -> None:
    options = itertools.product(HALVES, ["split", "float32"], [None, 128.0, "dynamic"])
    for precision, master_weights, loss_scale in options:
        module = Classifier(mlp())
        fit(
            module, classification(40),
            MasterWeightPrecision(precision, master_weights=master_weights, loss_scale=loss_scale),  # type: ignore[arg-type]
        )  # fmt: skip
        assert module.losses[-1] < 0.6 * module.losses[0], (precision, master_weights, loss_scale)


def test_a_trainer_with_the_plugin_can_be_pickled_before_fit_and_after() -> None:
    """Launchers that spawn processes do so."""
    ours = trainer(MasterWeightPrecision("16-true"))
    copied = pickle.loads(pickle.dumps(ours))
    copied.fit(Classifier(mlp()), loader(classification(2)))
    assert pickle.loads(pickle.dumps(copied.precision_plugin)).loss_scale == 2.0**15
