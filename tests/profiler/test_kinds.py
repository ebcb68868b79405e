"""Recording under everything that changes how a step runs: it names what it should, and changes no result."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_mpt.profiler import Category, MemoryProfiler, MemoryRecorder, MemoryReport

from .loops import Loop, blocks
from .test_lightning import Classifier, Manual, Recomputing, fit, trainer
from .test_lightning import data as batches

# torch.compile asks its inputs for their gradients, leaves or not, and torch warns of that.
GRAD_OF_NO_LEAF = "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"


def losses_and_report(loop: Loop, recorded: bool) -> tuple[list[float], MemoryReport | None]:
    torch.manual_seed(1)
    if not recorded:
        return [loop.step(i) for i in range(4)], None
    with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=2) as recorder:
        losses = []
        for i in range(4):
            losses.append(loop.step(i))
            recorder.step()
    return losses, recorder.report


@pytest.mark.filterwarnings(GRAD_OF_NO_LEAF)
@pytest.mark.parametrize(
    "reentrant",
    [None, pytest.param(False, marks=pytest.mark.slow), pytest.param(True, marks=pytest.mark.slow)],
    ids=["plain", "checkpointed", "checkpointed-reentrant"],
)
def test_a_compiled_module(reentrant: bool | None) -> None:
    """Compiled as a whole: the same losses, nothing more compiled for the hooks, and every byte a name."""
    found, frames = [], []
    for recorded in (False, True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        loop = blocks(reentrant)
        loop.module.compile(backend="aot_eager")
        losses, report = losses_and_report(loop, recorded)
        found.append(losses)
        frames.append(torch._dynamo.utils.counters["frames"]["total"])
    assert found[0] == found[1]
    assert frames[0] == frames[1] > 0
    assert report is not None
    assert "torch.compile" in report.notes[0]
    assert report.categories[Category.WEIGHTS] == 4 * report.parameters
    assert set(report.phases) == {"forward", "backward", "optimizer_step"}
    states = 4 * 5056 if reentrant is not None else 0  # of the random generator, which checkpoints keep
    assert report.categories[Category.UNATTRIBUTED] - states <= 0.01 * report.peak_bytes


@pytest.mark.filterwarnings(GRAD_OF_NO_LEAF)
def test_a_compiled_loss_beside_a_module_that_is_not() -> None:
    """A compiled function is seen by no one: the hooks must not be traced while it runs."""

    def make() -> Loop:
        torch.manual_seed(0)
        compiled = torch.compile(lambda y: y.tanh().square().mean(), backend="aot_eager")
        module = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
        return Loop(module, lambda model, g: compiled(model(torch.randn(32, 64, generator=g))))

    plain, _ = losses_and_report(make(), False)
    torch._dynamo.reset()
    recorded, report = losses_and_report(make(), True)
    assert plain == recorded
    assert report is not None
    assert report.notes == ()
    assert report.categories[Category.UNATTRIBUTED] <= 0.01 * report.peak_bytes


class Parts(L.LightningModule):
    """A discriminator and a generator of sorts, clipped by hand, each with its optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(64, 128), nn.Linear(128, 64)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, part in zip(self.optimizers(), (self.one, self.two), strict=True):
            self.toggle_optimizer(optimizer)
            self.manual_backward(self.two(self.one(batch[0]).relu()).square().mean())
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.AdamW(self.one.parameters()), torch.optim.SGD(self.two.parameters(), lr=0.1)]


ACCUMULATED = {"accumulate_grad_batches": 2, "max_epochs": 2}  # eight steps
KINDS: dict[str, tuple[type[L.LightningModule], dict[str, Any]]] = {
    "accumulated": (Classifier, ACCUMULATED),
    "accumulated, checkpointed and clipped": (Recomputing, {**ACCUMULATED, "gradient_clip_val": 1.0}),
    "two optimizers by hand": (Parts, {}),
    "two optimizers on shared activations": (Manual, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_trainer(kind: str, tmp_path: Any) -> None:
    module, options = KINDS[kind]
    torch.manual_seed(0)
    plain, recorded = module(), module()
    recorded.load_state_dict(plain.state_dict())
    torch.manual_seed(0)
    trainer(None, tmp_path, **options).fit(plain, batches())
    report = fit(recorded, tmp_path, MemoryProfiler(warmup_steps=2, steps=4), **options).profiler.report
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), recorded.parameters(), strict=True))
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.categories[Category.WEIGHTS] == 4 * report.parameters
    assert report.phases["optimizer_step"].categories[Category.GRADIENTS] <= 4 * report.parameters
    states = 5056 if module is Recomputing else 0
    assert report.categories[Category.UNATTRIBUTED] - states <= 0.01 * report.peak_bytes
    assert report.optimizers == (("AdamW", "SGD") if module in (Parts, Manual) else ("AdamW",))
    assert report.steps == 4


class Bare(Classifier):
    """Parameters of its own, used before any module or (alone) without one."""

    def __init__(self, alone: bool = False) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(64, 64))
        self.alone = alone

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        hidden = torch.tanh(torch.sigmoid(x @ self.first))
        return nn.functional.cross_entropy(hidden if self.alone else self.net(hidden), y)


@pytest.mark.parametrize("alone", [False, True], ids=["before-modules", "without-modules"])
def test_what_a_step_computes_before_any_module_is_activations(alone: bool, tmp_path: Any) -> None:
    report = fit(Bare(alone), tmp_path).profiler.report
    assert report.phases["backward"].categories[Category.INPUTS] == 32 * 64 * 4 + 32 * 8
    assert report.phases["backward"].categories[Category.ACTIVATIONS] >= 2 * 32 * 64 * 4


def test_averaged_weights_that_a_callback_keeps_have_a_name(tmp_path: Any) -> None:
    average = L.pytorch.callbacks.EMAWeightAveraging()
    report = fit(Classifier(), tmp_path, callbacks=[average]).profiler.report
    assert report.categories[Category.BUFFERS] == 4 * report.parameters + 8  # and how many were averaged
    assert report.categories[Category.WEIGHTS] == 4 * report.parameters


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric(precision: Any) -> None:
    def train(recorded: bool) -> tuple[list[float], MemoryReport | None]:
        fabric = L.Fabric(accelerator="cpu", devices=1, precision=precision)
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
        module, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters()))
        recorder = MemoryRecorder(module, optimizer, warmup_steps=1)
        losses = []
        if recorded:
            recorder.__enter__()
        for i in range(3):
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(i))
            loss = module(x).square().mean()
            fabric.backward(loss)
            if recorded:
                recorder.phase("clip")
            fabric.clip_gradients(module, optimizer, max_norm=1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if recorded:
                recorder.step()
        if recorded:
            recorder.__exit__(None, None, None)
        return losses, recorder.report if recorded else None

    plain, _ = train(False)
    losses, report = train(True)
    assert losses == plain
    assert report is not None
    assert list(report.phases) == ["forward", "backward", "clip", "optimizer_step"]
    assert report.optimizers == ("AdamW",)
    assert report.categories[Category.WEIGHTS] == 4 * report.parameters
    assert report.categories[Category.UNATTRIBUTED] <= 0.01 * report.peak_bytes
    assert bool(report.duplicates) == (precision == "bf16-mixed")
    assert not report.notes


class Lazy(Classifier):
    """Layers that the first batch makes, and one that no batch does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(256), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(10))
        self.unused = nn.LazyLinear(3)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.*uninitialized parameter:UserWarning")
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
@pytest.mark.parametrize("warmup_steps", [0, 1, 2])
def test_layers_that_the_first_batch_makes(warmup_steps: int, tmp_path: Any) -> None:
    report = fit(Lazy(), tmp_path, MemoryProfiler(warmup_steps=warmup_steps, steps=1)).profiler.report
    step = report.phases["optimizer_step"].categories
    assert report.parameters == 64 * 256 + 256 + 2 * 256 + 256 * 10 + 10
    assert step[Category.WEIGHTS] == step[Category.GRADIENTS] == 4 * report.parameters
    assert report.phases["backward"].categories[Category.BUFFERS] == 2 * 4 * 256 + 8
    assert report.categories[Category.UNATTRIBUTED] <= 0.01 * report.peak_bytes
