"""Gradient release: the same training, with no gradient kept, and refused where something needs them all at once."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from training import Classifier, TiedGPT2, adamw, classification, fit, loader, mlp, trainer

from lightning_mpt import PRESETS, MasterAdamW, MasterWeightPrecision
from lightning_mpt.kernels import tiling
from lightning_mpt.profiler import Category, MemoryProfiler

BATCHES = 30
ONE_GROUP = adamw()
ROUNDING = {"rtol": 1e-5, "atol": 1e-7}
"""Parameters are updated one by one rather than together, and vector and scalar code round apart."""


def released(**options: Any) -> MasterWeightPrecision:
    return MasterWeightPrecision(**{"precision": "bf16-true", "gradient_release": True, **options})


def no_decay_of_vectors(module: L.LightningModule) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in module.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.dim() == 1]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2)


def gradients_alive(module: nn.Module) -> list[list[int]]:
    """The sizes of the gradients that are there: a list more, whenever one is complete."""
    alive: list[list[int]] = []

    def note(_: Tensor) -> None:
        alive.append([parameter.numel() for parameter in module.parameters() if parameter.grad is not None])

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(note)
    return alive


def tokens(count: int) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(64, (4, 32), generator=generator),) for _ in range(count)]


@pytest.mark.parametrize("storages", [PRESETS["exact"], PRESETS["compact"]], ids=["exact", "compact"])
@pytest.mark.parametrize("options", [{}, {"precision": "16-true", "loss_scale": 256.0}], ids=["bf16", "fp16"])
def test_training_is_what_it_is_without(options: dict[str, Any], storages: dict[str, Any]) -> None:
    """With clipping by value, a schedule, and compact storage too."""

    def configure(module: L.LightningModule) -> Any:
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=BATCHES)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    runs = []
    for release in (True, False):
        module = Classifier(mlp(), configure)
        plugin = released(gradient_release=release, **options, **storages)
        fit(module, classification(BATCHES), plugin, gradient_clip_val=0.01, gradient_clip_algorithm="value")
        runs.append(module)
    torch.testing.assert_close(runs[0].losses, runs[1].losses, rtol=1e-2, atol=1e-3)
    if storages is PRESETS["exact"]:
        torch.testing.assert_close(runs[0].state_dict(), runs[1].state_dict(), **ROUNDING)
    assert runs[0].losses[-1] < runs[0].losses[0]


def test_a_tied_weight_is_updated_once_when_both_its_uses_are_done() -> None:
    ours, plain = TiedGPT2(), TiedGPT2()
    fit(ours, tokens(10), released())
    fit(plain, tokens(10), released(gradient_release=False))
    torch.testing.assert_close(ours.losses, plain.losses, rtol=1e-3, atol=0)


def test_no_more_than_a_layers_gradients_are_alive_together() -> None:
    """Its weight's and its bias's in backward, and none when the step begins."""
    before_step: list[int] = []

    class Counts(Classifier):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            before_step.append(sum(parameter.grad is not None for parameter in self.parameters()))

    module = Counts(mlp())
    in_backward = gradients_alive(module)
    fit(module, classification(3), released())
    assert before_step == [0, 0, 0]
    assert len(in_backward) == 3 * 6
    assert max(map(len, in_backward)) <= 2


@pytest.fixture
def _by_triton(triton_kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.mark.usefixtures("_by_triton")
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")
@pytest.mark.parametrize("configure", [ONE_GROUP, no_decay_of_vectors], ids=["one group", "two groups"])
def test_with_the_kernel_as_many_wait_for_one_another_as_are_worth_a_launch(
    configure: Callable[[L.LightningModule], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And small ones of a group of their own wait for all of it, rather than be launched with every large one."""
    monkeypatch.setattr(tiling, "RELEASES", 4)
    launches, of_vectors = [], 0
    step_some = MasterAdamW.step_some

    def counted(self: MasterAdamW, parameters: Any, *arguments: Any) -> Tensor:
        nonlocal of_vectors
        launches.append(len(parameters))
        of_vectors += all(parameter.dim() == 1 for parameter in parameters)
        return step_some(self, parameters, *arguments)

    monkeypatch.setattr(MasterAdamW, "step_some", counted)
    net = nn.Sequential(*(nn.Linear(16, 16) for _ in range(8)), nn.Linear(16, 4))
    ours, plain = Classifier(net, configure), Classifier(copy.deepcopy(net), configure)
    alive = gradients_alive(ours)
    fit(ours, classification(4), released())
    fit(plain, classification(4), released(gradient_release=False))
    total = sum(parameter.numel() for parameter in net.parameters())
    assert sum(launches) == 4 * 18
    assert len(launches) <= 4 * 5
    assert of_vectors == (0 if configure is ONE_GROUP else 4)
    assert max(map(sum, alive)) <= total // 4 + 16 * 17
    torch.testing.assert_close(ours.state_dict(), plain.state_dict(), **ROUNDING)


class Several(Classifier):
    """Every parameter is a group of its own; one of them has no elements."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__(net, lambda module: torch.optim.AdamW([{"params": [p]} for p in module.parameters()], lr=1e-2))
        self.empty = nn.Parameter(torch.zeros(0))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return loss + self.empty.sum()


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("options", [{}, PRESETS["compact"]], ids=["exact", "compact"])
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")
def test_with_batchnorm_many_groups_and_an_empty_parameter(
    kernel: str, options: dict[str, Any], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of two dtypes meet in a launch, in the half default dtype of backward."""
    if kernel == "triton":
        request.getfixturevalue("_by_triton")
    monkeypatch.setattr(tiling, "RELEASES", 4)
    layers = [layer for _ in range(6) for layer in (nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU())]
    ours = Several(nn.Sequential(*layers, nn.Linear(16, 4)))
    plain = copy.deepcopy(ours)
    total = sum(parameter.numel() for parameter in ours.parameters())
    alive = gradients_alive(ours)
    fit(ours, classification(4), released(**options))
    fit(plain, classification(4), released(gradient_release=False, **options))
    assert max(map(sum, alive)) <= total // 4 + 17 * 16
    if not options:
        torch.testing.assert_close(ours.state_dict(), plain.state_dict(), rtol=1e-4, atol=1e-6)
    assert ours.losses == pytest.approx(plain.losses, rel=0.02)


class Recomputing(Classifier):
    """Its only layer runs in three checkpointed segments."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__(nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 4)]))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        inner, last = self.net  # type: ignore[misc]
        x = x.requires_grad_()
        for _ in range(3):
            x = checkpoint(inner, x, use_reentrant=self.use_reentrant)
        return last(x)


def test_a_gradient_that_comes_in_parts_is_refused_by_name() -> None:
    fit(Recomputing(False), classification(2), released())
    with pytest.raises(RuntimeError, match=r"gradient of net\.0\.bias came again .* use_reentrant=False"):
        fit(Recomputing(True), classification(2), released())


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning")
def test_a_gradient_that_is_not_finite_skips_its_parameter_alone_and_is_counted(
    kernel: str, request: pytest.FixtureRequest
) -> None:
    if kernel == "triton":
        request.getfixturevalue("_by_triton")

    class Breaks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            assert loss is not None
            # 0 * inf: NaN for the last bias, nothing for the others.
            return loss + self.net[-1].bias.sum() * 0.0 * (float("inf") if batch_idx == 1 else 1.0)  # type: ignore[index, operator]

    seen: list[dict[str, Tensor]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
            seen.append({name: value.clone() for name, value in module.state_dict().items()})

    plugin = released()
    fit(Breaks(mlp()), classification(3), plugin, callbacks=[Watch()])
    assert plugin.skipped_steps == 1
    still = {name for name in seen[0] if torch.equal(seen[0][name], seen[1][name])}
    assert still == {"net.4.bias"}
    assert all(not torch.equal(seen[1][name], seen[2][name]) for name in seen[0])


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_skipped_step_is_not_counted_again_by_a_training_step_of_none() -> None:
    class Sometimes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            loss = super().training_step(batch, batch_idx)
            return None if loss is None or batch_idx % 2 else loss * float("inf")

    plugin = released()
    fit(Sometimes(mlp()), classification(4), plugin)
    assert plugin.skipped_steps == 2


def manual(module: Classifier) -> Classifier:
    module.automatic_optimization = False
    return module


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (Classifier, {"gradient_clip_val": 1.0}, r"gradient_clip_val=1.0 by norm: the norm is known when"),
        (Classifier, {"accumulate_grad_batches": 4}, r"accumulate_grad_batches=4: gradients are gone"),
        (Classifier, {"callbacks": [GradientAccumulationScheduler({0: 2})]}, r"accumulate_grad_batches=2"),
        (lambda net: manual(Classifier(net)), {}, "manual optimization"),
        (lambda net: Classifier(net, lambda m: torch.optim.SGD(m.parameters(), lr=0.1)), {}, "single AdamW or Adam"),
    ],
    ids=["norm", "accumulation", "accumulation later", "manual", "SGD"],
)  # fmt: skip
def test_what_needs_all_gradients_is_refused_with_the_reason(
    make: Callable[[nn.Module], L.LightningModule], options: dict[str, Any], message: str
) -> None:
    module = make(mlp())
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        fit(module, classification(4), released(), **options)
    torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("loss_scale", ["auto", "dynamic"])
def test_a_dynamic_scale_is_refused_at_construction(loss_scale: str) -> None:
    with pytest.raises(ValueError, match=r"gradient_release=True cannot be with loss_scale='\w+', which is dynamic"):
        released(precision="16-true", loss_scale=loss_scale)


def test_clipping_that_comes_too_late_is_refused() -> None:
    class Clips(Classifier):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            self.clip_gradients(optimizer, gradient_clip_val=0.5, gradient_clip_algorithm="norm")

    with pytest.raises(ValueError, match=r"Clipping to 0\.5 by 'norm' is asked for after backward"):
        fit(Clips(mlp()), classification(2), released())


def test_after_fit_backward_leaves_gradients_again() -> None:
    module = Classifier(mlp(), adamw())
    fit(module, classification(2), released())
    module(torch.randn(2, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert not any(parameter._post_accumulate_grad_hooks for parameter in module.parameters())


def test_the_profiler_sees_gradients_come_and_go(tmp_path: Path) -> None:
    reports = {}
    for release in (True, False):
        # Deep, so that one gradient is little beside all of them.
        hidden = [layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.ReLU())]
        module = Classifier(nn.Sequential(nn.Linear(16, 256), *hidden, nn.Linear(256, 4)))
        profiler = MemoryProfiler(tmp_path)
        ours = trainer(released(gradient_release=release), profiler=profiler)
        ours.fit(module, loader(classification(6)))
        reports[release] = profiler.report
    largest = max(parameter.numel() for parameter in module.parameters())
    backward, step = (reports[True].phases[phase].categories for phase in ("backward", "optimizer_step"))
    assert 0 < backward[Category.GRADIENTS] <= 2 * largest
    assert step[Category.GRADIENTS] == 0
    assert reports[True].categories[Category.UNATTRIBUTED] <= 0.01 * reports[True].peak_bytes
    assert reports[True].peak_bytes < reports[False].peak_bytes
