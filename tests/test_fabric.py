"""The Fabric plugin in real loops: the Trainer plugin's training bit for bit, FP32 files, and FP32 again at the end."""

import copy
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR
from training import Classifier, classification, fit, mlp

from lightning_mpt import FabricMasterWeightPrecision, MasterWeightPrecision
from lightning_mpt.profiler import MemoryRecorder

HALVES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
}
EXACT: dict[str, Any] = {"rtol": 0, "atol": 0}


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 4),
    )  # fmt: skip


def fabric_with(plugin: FabricMasterWeightPrecision | None = None) -> Fabric:
    return Fabric(accelerator="cpu", devices=1, plugins=[] if plugin is None else [plugin])


class Loop:
    """What a user of Fabric writes."""

    def __init__(
        self,
        plugin: FabricMasterWeightPrecision | None,
        net: nn.Module | None = None,
        optimizer: str = "adamw",
    ) -> None:
        self.plugin, self.fabric, self.net = plugin, fabric_with(plugin), convnet() if net is None else net
        self.model, self.optimizer = self.fabric.setup(self.net, OPTIMIZERS[optimizer](self.net.parameters()))
        self.losses: list[float] = []

    def train(self, batches: Sequence[tuple[Tensor, ...]], accumulate: int = 1, **clip: float) -> "Loop":
        for index, (x, y) in enumerate(batches):
            last = (index + 1) % accumulate == 0
            with self.fabric.no_backward_sync(self.model, enabled=not last):
                loss = F.cross_entropy(self.model(x), y)
                self.losses.append(loss.item())
                self.fabric.backward(loss / accumulate)
            if last:
                if clip:
                    self.fabric.clip_gradients(self.model, self.optimizer, **clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self

    @property
    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "precision": self.plugin}


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize(("clip", "name"), [("norm", "adamw"), ("value", "sgd"), (None, "adamw")])
def test_training_is_the_trainers_bit_for_bit(precision: Any, name: str, clip: str | None) -> None:
    batches = classification(6)
    module = Classifier(convnet(), lambda module: OPTIMIZERS[name](module.parameters()))
    options = {} if clip is None else {"gradient_clip_val": 0.05, "gradient_clip_algorithm": clip}
    fit(module, batches, MasterWeightPrecision(precision), accumulate_grad_batches=2, **options)
    loop = Loop(FabricMasterWeightPrecision(precision), optimizer=name)
    loop.train(batches, accumulate=2, **{None: {}, "norm": {"max_norm": 0.05}, "value": {"clip_val": 0.05}}[clip])
    assert loop.losses == module.losses
    torch.testing.assert_close(loop.model.state_dict(), module.net.state_dict(), **EXACT)


@pytest.mark.parametrize(("precision", "name"), list(zip(HALVES, OPTIMIZERS, strict=True)))
def test_it_learns_as_in_fp32(precision: Any, name: str) -> None:
    batches = classification(60)
    fp32 = Loop(None, optimizer=name).train(batches)
    ours = Loop(FabricMasterWeightPrecision(precision), optimizer=name).train(batches)
    assert sum(ours.losses[-10:]) == pytest.approx(sum(fp32.losses[-10:]), rel=0.1)
    assert ours.losses[-1] < 0.7 * ours.losses[0]


@pytest.mark.parametrize("precision", HALVES)
def test_the_module_is_half_takes_half_and_gives_fp32(precision: Any) -> None:
    loop = Loop(FabricMasterWeightPrecision(precision))
    seen: list[torch.dtype] = []
    loop.net[1].register_forward_hook(lambda _, args, output: seen.extend([args[0].dtype, output.dtype]))  # type: ignore[index]
    output = loop.model(torch.randn(2, 16))
    loop.fabric.backward(output.sum())
    gradients = {p.grad.dtype for p in loop.net.parameters() if p.grad is not None}
    assert seen == [HALVES[precision]] * 2
    assert output.dtype == torch.float32
    assert gradients == {HALVES[precision], torch.float32}  # FP32 for BatchNorm
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("precision", HALVES)
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(precision: Any) -> None:
    """The schedule that was handed over included; clipping raises nothing."""
    plugin = FabricMasterWeightPrecision(precision, loss_scale="dynamic")
    loop = Loop(plugin)
    schedule = LinearLR(loop.optimizer, 1.0, 0.1, total_iters=10)
    plugin.hold(schedule)

    def step(spoil: bool) -> dict[str, Any]:
        ((x, y),) = classification(1)
        loop.fabric.backward(F.cross_entropy(loop.model(x), y))
        if spoil:
            loop.net[1].weight.grad.view(-1)[3] = float("nan")  # type: ignore[index]
        norm = loop.fabric.clip_gradients(loop.model, loop.optimizer, max_norm=1.0)
        assert norm.isfinite() != spoil
        loop.optimizer.step()
        schedule.step()
        loop.optimizer.zero_grad()
        state = {"weights": dict(loop.net.named_parameters()), "optimizer": loop.optimizer.state_dict()["state"]}
        masters = plugin.master_params(loop.optimizer)
        return copy.deepcopy({**state, "masters": masters, "schedule": schedule.last_epoch})

    first, skipped, third = step(False), step(True), step(False)
    torch.testing.assert_close(skipped, first, **EXACT)
    assert not torch.equal(third["masters"][0], first["masters"][0])
    assert (plugin.skipped_steps, plugin.loss_scale, third["schedule"]) == (1, 2.0**14, 2)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("precision", HALVES)
def test_a_file_is_fp32_and_a_run_resumes_bit_for_bit(tmp_path: Path, precision: Any, name: str) -> None:
    batches, path = classification(8), tmp_path / "half-way.ckpt"
    whole = Loop(FabricMasterWeightPrecision(precision), optimizer=name).train(batches)
    first = Loop(FabricMasterWeightPrecision(precision), optimizer=name).train(batches[:4])
    first.fabric.save(path, first.state)
    saved = torch.load(path, weights_only=True)
    floats = [*saved["model"].values(), *(v for s in saved["optimizer"]["state"].values() for v in s.values())]
    assert {v.dtype for v in floats if isinstance(v, Tensor) and v.is_floating_point()} == {torch.float32}
    second = Loop(FabricMasterWeightPrecision(precision), optimizer=name)
    second.fabric.load(path, second.state)
    second.train(batches[4:])
    assert second.losses == whole.losses[4:]
    torch.testing.assert_close(second.model.state_dict(), whole.model.state_dict(), **EXACT)
    torch.testing.assert_close(second.optimizer.state_dict(), whole.optimizer.state_dict(), **EXACT)


def test_a_run_goes_on_in_fp32_from_its_file_and_the_other_way_round(tmp_path: Path) -> None:
    batches = classification(40)
    plain = {"model", "optimizer"}
    for first, second in ((FabricMasterWeightPrecision("bf16-true"), None), (None, FabricMasterWeightPrecision())):
        before = Loop(first).train(batches[:20])
        before.fabric.save(tmp_path / "a.ckpt", {name: before.state[name] for name in plain})
        after = Loop(second)
        after.fabric.load(tmp_path / "a.ckpt", {name: after.state[name] for name in plain})
        after.train(batches[20:])
        assert sum(after.losses) < 0.8 * sum(before.losses)


def test_an_optimizer_that_is_set_up_after_its_module_loads_fp32_too(tmp_path: Path) -> None:
    batches, path = classification(4), tmp_path / "a.ckpt"
    first = Loop(FabricMasterWeightPrecision("bf16-true")).train(batches)
    first.fabric.save(path, {"optimizer": first.optimizer})
    fabric, net = fabric_with(FabricMasterWeightPrecision("bf16-true")), convnet()
    fabric.setup_module(net)
    optimizer = fabric.setup_optimizers(OPTIMIZERS["adamw"](net.parameters()))
    fabric.load(path, {"optimizer": optimizer})
    torch.testing.assert_close(optimizer.state_dict(), first.optimizer.state_dict(), **EXACT)


def test_clipping_is_by_the_true_norm_and_scales_do_not_matter() -> None:
    (batch,) = classification(1)
    ways = []
    for scale in (None, 1024.0):
        plugin = FabricMasterWeightPrecision("bf16-true", loss_scale=scale)
        loop = Loop(plugin, mlp(), "sgd")
        start = copy.deepcopy(loop.net.state_dict())
        loop.fabric.backward(F.cross_entropy(loop.model(batch[0]), batch[1]))
        norm = loop.fabric.clip_gradients(loop.model, loop.optimizer, max_norm=0.01)
        loop.optimizer.step()
        plugin.restore()
        ways.append(torch.cat([(loop.net.state_dict()[name] - start[name]).flatten() for name in start]))
        assert ways[-1].norm().item() == pytest.approx(0.1 * 0.01, rel=1e-3)  # lr times the clipped norm
    reference = mlp()
    F.cross_entropy(reference(batch[0]), batch[1]).backward()
    true = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None]))
    assert norm.item() == pytest.approx(true.item(), rel=0.02)  # worst seen 4e-3: forward and backward are bf16
    assert plugin.grad_norm == norm.item()
    torch.testing.assert_close(ways[0], ways[1], rtol=1e-4, atol=1e-8)


def test_clipping_by_another_norm_is_refused() -> None:
    loop = Loop(FabricMasterWeightPrecision("bf16-true"))
    with pytest.raises(ValueError, match=r"norm_type='inf' cannot be.*clip_val"):
        loop.fabric.clip_gradients(loop.model, loop.optimizer, max_norm=1.0, norm_type="inf")  # type: ignore[arg-type]


def test_two_optimizers_of_one_backward_divide_by_the_scale_it_had() -> None:
    """The first one's overflow halves the scale; the second's gradients were made under the old one."""
    ways = {}
    for spoil in (False, True):
        net = mlp()
        plugin = FabricMasterWeightPrecision("16-true", loss_scale="dynamic")
        fabric = fabric_with(plugin)
        a, b = (torch.optim.SGD(net[i].parameters(), lr=1.0) for i in (0, 4))  # type: ignore[index]
        model, a, b = fabric.setup(net, a, b)
        ((x, y),) = classification(1)
        fabric.backward(F.cross_entropy(model(x), y))
        if spoil:
            net[0].weight.grad.fill_(float("inf"))  # type: ignore[index]
        before = {name: value.clone() for name, value in model.state_dict().items()}
        a.step()
        b.step()
        ways[spoil] = {name: value - before[name] for name, value in model.state_dict().items()}
        assert plugin.loss_scale == (2.0**14 if spoil else 2.0**15)
    assert not ways[True]["0.weight"].any()
    assert ways[True]["4.weight"].any()
    torch.testing.assert_close(ways[True]["4.weight"], ways[False]["4.weight"], **EXACT)


def test_adversaries_train_as_in_fp32() -> None:
    ends = []
    for plugin in (None, FabricMasterWeightPrecision("16-true")):
        fabric, losses = fabric_with(plugin), []
        torch.manual_seed(0)
        nets = [mlp(), mlp()]
        pairs = [
            fabric.setup(net, OPTIMIZERS[name](net.parameters())) for net, name in zip(nets, OPTIMIZERS, strict=True)
        ]
        for x, y in classification(40):
            for model, optimizer in pairs:
                optimizer.zero_grad()
                others = sum(F.cross_entropy(other(x), y) for other, _ in pairs if other is not model)
                fabric.backward(F.cross_entropy(model(x), y) + 0.1 * others)
                optimizer.step()
            losses.append(F.cross_entropy(pairs[0][0](x), y).item())
        ends.append(sum(losses[-10:]) / 10)
        assert ends[-1] < 0.7 * losses[0]
    assert ends[1] == pytest.approx(ends[0], rel=0.1)


def test_modules_that_share_a_part_keep_one_master_of_it_and_are_fp32_outside() -> None:
    encoder = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16))
    encoder.register_buffer("table", torch.linspace(0, 1, 7))
    actor, critic = nn.Sequential(encoder, nn.Linear(16, 4)), nn.Sequential(encoder, nn.Linear(16, 4))
    critic[1].weight = actor[1].weight
    start = copy.deepcopy((actor.state_dict(), critic.state_dict()))
    plugin = FabricMasterWeightPrecision("bf16-true")
    fabric = fabric_with(plugin)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        actor_model, optimizer = fabric.setup(actor, torch.optim.AdamW(actor.parameters(), lr=1e-2))
        critic_model = fabric.setup(critic)
    torch.testing.assert_close((actor_model.state_dict(), critic_model.state_dict()), start, **EXACT)
    x, y = classification(1)[0]
    fabric.backward(F.cross_entropy(actor_model(x), y) + F.cross_entropy(critic_model(x), y))
    optimizer.step()
    trained = copy.deepcopy((actor_model.state_dict(), critic_model.state_dict()))
    for name in ("0.0.weight", "1.weight"):
        assert torch.equal(trained[0][name], trained[1][name])
        assert not torch.equal(trained[0][name], start[0][name])
    plugin.restore()
    torch.testing.assert_close((actor.state_dict(), critic.state_dict()), trained, **EXACT)
    assert {p.dtype for p in [*actor.parameters(), *critic.parameters()]} == {torch.float32}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_after_restore_all_is_fp32_and_the_loop_goes_on(name: str) -> None:
    plugin = FabricMasterWeightPrecision("16-true")
    loop = Loop(plugin, optimizer=name).train(classification(20))
    held = LinearLR(loop.optimizer, 1.0, 0.1, total_iters=1000)
    plugin.hold(held)
    strategy, before = loop.fabric.strategy, copy.deepcopy(loop.model.state_dict())
    plugin.restore()
    assert type(strategy).__module__.startswith("lightning.")
    assert type(held) is LinearLR
    assert type(loop.optimizer.optimizer) in (torch.optim.AdamW, torch.optim.SGD)
    torch.testing.assert_close(loop.net.state_dict(), before, **EXACT)
    assert {p.dtype for p in loop.net.parameters()} == {torch.float32}
    assert not any(part._state_dict_hooks or part._forward_hooks for part in loop.net.modules())
    loop.train(classification(20), max_norm=1.0)
    assert loop.model(torch.randn(2, 16)).dtype == torch.float32
    assert loop.losses[-1] < loop.losses[0]
    assert plugin.skipped_steps == 0


def test_a_closure_runs_before_its_step() -> None:
    batches, ends = classification(4), []
    for with_closure in (True, False):
        loop = Loop(FabricMasterWeightPrecision("16-true"))
        for batch in batches:
            if with_closure:
                assert loop.optimizer.step(partial(forward_and_backward, loop, batch)) > 0
            else:
                forward_and_backward(loop, batch)
                loop.optimizer.step()
        ends.append(loop.model.state_dict())
    torch.testing.assert_close(ends[0], ends[1], **EXACT)


def forward_and_backward(loop: Loop, batch: tuple[Tensor, ...]) -> float:
    loop.optimizer.zero_grad()
    loss = F.cross_entropy(loop.model(batch[0]), batch[1])
    loop.fabric.backward(loss)
    return loss.item()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"precision": "16-mixed"}, "'16-mixed' is not one of '16-true', 'bf16-true': FabricMasterWeightPrecision"),
        ({"loss_scale": 0}, "loss_scale=0 is not a loss scale"),
        ({"master_weights": "fp32"}, "master_weights='fp32' is not a way"),
    ],
    ids=str,
)
def test_wrong_arguments_fail_at_construction(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FabricMasterWeightPrecision(**arguments)


def test_lbfgs_is_refused_at_setup() -> None:
    net = mlp()
    with pytest.raises(ValueError, match="LBFGS evaluates the loss many times"):
        fabric_with(FabricMasterWeightPrecision("16-true")).setup(net, torch.optim.LBFGS(net.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_recorder_names_every_byte_of_a_loop(name: str) -> None:
    hidden = [layer for _ in range(3) for layer in (nn.Linear(128, 128), nn.ReLU())]
    net = nn.Sequential(nn.Linear(16, 128), *hidden, nn.Linear(128, 4))
    loop = Loop(FabricMasterWeightPrecision("bf16-true"), net, name)
    count = sum(parameter.numel() for parameter in loop.net.parameters())
    with MemoryRecorder(loop.model, loop.optimizer, warmup_steps=2, witnesses=[loop.plugin]) as recorder:
        for batch in classification(4):
            loop.train([batch], max_norm=1.0)
            recorder.step()
    categories = recorder.report.categories
    assert categories["weights"] == 2 * count
    assert categories["master_weights"] == (2 if name == "adamw" else 4) * count
    assert categories["optimizer_state"] >= (8 if name == "adamw" else 4) * count
    assert categories["unattributed"] <= 0.01 * recorder.report.peak_bytes


def test_logits_are_fp32_to_the_loop_and_take_no_fp32_memory() -> None:
    """Cross entropy outside of the module, on what it gives: the peak is the half logits and their half gradient."""
    rows, classes = 256, 9000
    fabric = fabric_with(FabricMasterWeightPrecision("bf16-true"))
    head = nn.Linear(8, classes, bias=False)
    model, optimizer = fabric.setup(head, torch.optim.AdamW(head.parameters(), lr=0.1))
    x, target = torch.randn(rows, 8), torch.randint(classes, (rows,))
    recorder = MemoryRecorder(head, steps=1, warmup_steps=1)
    with recorder:
        for _ in range(2):
            logits = model(x)
            assert logits.dtype == torch.float32
            loss = F.cross_entropy(logits, target)
            del logits
            fabric.backward(loss)
            del loss
            optimizer.zero_grad()
            recorder.step()
    assert recorder.report.peak_bytes <= 1.2 * 2 * 2 * rows * classes
    torch.testing.assert_close(F.cross_entropy(model(x), target), F.cross_entropy(model(x) * 1.0, target))
