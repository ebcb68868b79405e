"""Methods that optimizers have beside `step`: over the masters they do what they do over FP32 weights."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from test_bridge import parameters
from torch import Tensor, nn
from training import Classifier, Validated, classification, loader, mlp, trainer
from unusual_optimizers import SAM, SGDScheduleFree

from lightning_mpt import FabricMasterWeightPrecision, MasterWeightPrecision
from lightning_mpt.bridge import bridge
from lightning_mpt.masters import MasterWeights
from lightning_mpt.own_methods import own_methods, reads_gradients

Give = Callable[[int], None]

# -- over `bridge`, held against the same optimizer over FP32 copies ------------------------------------------------


def pair(make: Callable[[Any], torch.optim.Optimizer], *, loss_scaled: bool = False) -> Any:
    """The same optimizer over half parameters and over FP32 copies of them, and what gives both the same gradients."""
    params = parameters()
    copies = [nn.Parameter(parameter.detach().float().clone()) for parameter in params]

    def give(step: int) -> None:
        generator = torch.Generator().manual_seed(step)
        for parameter, fp32 in zip(params, copies, strict=True):
            gradient = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.grad, fp32.grad = gradient, gradient.float().clone()

    return bridge(make(params), MasterWeights(), loss_scaled=loss_scaled), make(copies), params, copies, give


def assert_same(ours: Any, params: list[nn.Parameter], copies: list[nn.Parameter]) -> None:
    """The masters are the FP32 copies, bit for bit, and the half weights and gradients are their rounding."""
    torch.testing.assert_close(ours.master_params(), [c.detach() for c in copies], rtol=0, atol=0)
    for parameter, fp32 in zip(params, copies, strict=True):
        torch.testing.assert_close(parameter.detach().float(), fp32.detach(), rtol=2**-8, atol=1e-6)
        assert (parameter.grad is None) == (fp32.grad is None)
        if parameter.grad is not None and fp32.grad is not None:
            torch.testing.assert_close(parameter.grad.float(), fp32.grad, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("zero_grad", [True, False], ids=["zeroing", "keeping"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW], ids=["SGD", "AdamW"])
def test_sam_is_sam_over_fp32_copies(base: Any, zero_grad: bool) -> None:
    options = {"momentum": 0.9} if base is torch.optim.SGD else {}
    ours, theirs, params, copies, give = pair(lambda p: SAM(p, base, lr=0.01, **options))
    for step in range(5):
        give(2 * step)
        ours.first_step(zero_grad=zero_grad)
        theirs.first_step(zero_grad=zero_grad)
        assert_same(ours, params, copies)
        give(2 * step + 1)
        ours.second_step(zero_grad)
        theirs.second_step(zero_grad)
        assert_same(ours, params, copies)
    ours.release()
    assert type(ours) is SAM
    assert set(ours.state) == set(ours.base_optimizer.state) == set(params)


def test_schedule_free_is_schedule_free_over_fp32_copies() -> None:
    ours, theirs, params, copies, give = pair(SGDScheduleFree, loss_scaled=True)
    for step in range(6):
        give(step)
        ours.step()
        theirs.step()
        if step % 2:
            for one in (ours, theirs):
                one.eval()
            assert_same(ours, params, copies)
            for one in (ours, theirs):
                one.train()
        assert_same(ours, params, copies)
        with ours.averaged(), theirs.averaged():
            assert_same(ours, params, copies)
            assert ours.param_groups[0]["params"] == params
        assert_same(ours, params, copies)
    ours.eval()
    theirs.eval()
    assert_same(ours, params, copies)
    masters = ours.master_params()
    ours.release()
    for parameter, master in zip(params, masters, strict=True):
        parameter.data = master.clone()  # as the module does
    ours.train()
    theirs.train()
    torch.testing.assert_close([p.detach() for p in params], [c.detach() for c in copies], rtol=0, atol=0)


class Various(torch.optim.SGD):
    """Methods of all kinds."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1, momentum=0.9)
        self.seen: list[Any] = []

    def lr(self) -> float:
        self.seen += [p.dtype for group in self.param_groups for p in group["params"]]
        return self.param_groups[0]["lr"]  # type: ignore[no-any-return]

    def all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def momentum_of(self, parameter: Tensor, *, method: str) -> Tensor:
        momentum: Tensor = self.state[parameter][method]
        return momentum

    def halve_gradients(self) -> None:
        for p in self.all_params():
            if p.grad is not None:
                p.grad.data.mul_(0.5)

    def make_gradients(self) -> None:
        for p in self.all_params():
            p.grad = torch.full_like(p, 0.5)

    def twice(self) -> None:
        self.step()
        self.step()

    def forget(self) -> None:
        self.zero_grad(set_to_none=False)

    def norm(self) -> Any:
        return _norm(self)

    def none(self) -> None:
        with torch.no_grad():
            self._helper()

    def _helper(self) -> None:
        return None

    def by_name(self) -> list[Any]:
        return [getattr(p, "grad") for p in self.all_params()]  # noqa: B009

    def write_outside(self, where: dict[str, Any]) -> None:
        with torch.no_grad():
            where["parameters"]().fill_(1.0)

    @staticmethod
    def plain() -> int:
        return 1


def _norm(optimizer: torch.optim.Optimizer) -> Any:
    return sum(p.grad.norm() for group in optimizer.param_groups for p in group["params"])


READS = {"halve_gradients", "make_gradients", "twice", "forget", "norm", "by_name"}


def test_which_methods_there_are_and_which_read_gradients() -> None:
    methods = own_methods(Various)
    assert {name for name in methods if reads_gradients(Various, methods[name])} == READS
    assert set(methods) == READS | {"lr", "all_params", "momentum_of", "none", "write_outside"}
    assert own_methods(torch.optim.SGD) == {}
    sam, free = own_methods(SAM), own_methods(SGDScheduleFree)
    assert set(sam) == {"first_step", "second_step"}
    assert all(reads_gradients(SAM, method) for method in sam.values())
    assert set(free) == {"train", "eval", "averaged"}
    assert not any(reads_gradients(SGDScheduleFree, method) for method in free.values())


@pytest.mark.parametrize("name", ["halve_gradients", "make_gradients", "twice", "forget"])
def test_what_a_method_makes_of_gradients_holds(name: str) -> None:
    ours, theirs, params, copies, give = pair(Various)
    give(0)
    if name == "make_gradients":
        for parameter in (*params, *copies):
            parameter.grad = None
    getattr(ours, name)()
    getattr(theirs, name)()
    assert_same(ours, params, copies)


def test_parameters_that_go_in_and_out_are_the_modules_own() -> None:
    ours, theirs, params, copies, give = pair(Various)
    give(0)
    ours.step()
    theirs.step()
    assert all(one is parameter for one, parameter in zip(ours.all_params(), params, strict=True))
    momentum = ours.momentum_of(params[0], method="momentum_buffer")
    assert torch.equal(momentum, theirs.momentum_of(copies[0], method="momentum_buffer"))
    assert ours.plain() == 1


def test_a_method_that_changes_no_weight_is_nothing_to_autograd() -> None:
    ours, _, params, _, give = pair(Various, loss_scaled=True)
    give(0)
    versions = [parameter._version for parameter in params]
    assert ours.lr() == 0.1
    assert ours.seen == [torch.float32] * 3
    assert [parameter._version for parameter in params] == versions
    assert all(parameter.grad is not None for parameter in params)


@pytest.mark.parametrize("name", sorted(READS))
def test_under_a_loss_scale_a_method_that_reads_gradients_is_refused(name: str) -> None:
    ours, _, _, _, give = pair(Various, loss_scaled=True)
    give(0)
    with pytest.raises(RuntimeError, match=rf"Various.{name} reads gradients outside of step.*'bf16-true'"):
        getattr(ours, name)()


def test_a_method_that_writes_to_half_weights_is_refused() -> None:
    ours, _, params, _, _ = pair(Various)
    with pytest.raises(RuntimeError, match=r"Various.write_outside wrote to half weights"):
        ours.write_outside({"parameters": lambda: params[0]})


# -- in a real loop -------------------------------------------------------------------------------------------------


class ScheduleFree(Validated):
    """Validates, saves and ends with the averages."""

    def __init__(self) -> None:
        super().__init__(mlp(), lambda module: SGDScheduleFree(module.parameters()))
        self.validated: list[float] = []

    def _optimizer(self) -> Any:
        return self.optimizers()

    def on_train_epoch_start(self) -> None:
        self._optimizer().train()

    def on_validation_epoch_start(self) -> None:
        self._optimizer().eval()

    def on_validation_epoch_end(self) -> None:
        self.validated.append(float(self.trainer.callback_metrics["val_loss"]) if self.losses else 0.0)
        self.saved = copy.deepcopy(self.state_dict())
        self._optimizer().train()

    def on_train_end(self) -> None:
        self._optimizer().eval()


class ScheduleFreeByTrainer(ScheduleFree):
    def _optimizer(self) -> Any:
        return self.trainer.optimizers[0]


TOLERANCE = {"16-true": 5e-3, "bf16-true": 2e-2}
"""Half rounding, of twenty steps' losses."""


@pytest.mark.parametrize("kind", [ScheduleFree, ScheduleFreeByTrainer], ids=["optimizers()", "trainer.optimizers"])
@pytest.mark.parametrize("precision", TOLERANCE)
def test_schedule_free_validates_and_ends_with_the_averages(precision: Any, kind: Any) -> None:
    ours, fp32 = kind(), kind()
    batches = classification(10)
    options: dict[str, Any] = {"max_epochs": 3, "num_sanity_val_steps": 0}
    loss_scale = 1024.0 if precision == "16-true" else None
    for module, plugin in ((ours, MasterWeightPrecision(precision, loss_scale=loss_scale)), (fp32, None)):
        trainer(plugin, **options).fit(module, loader(batches), loader(batches))
    rtol = TOLERANCE[precision]
    torch.testing.assert_close(ours.losses, fp32.losses, rtol=rtol, atol=0)
    torch.testing.assert_close(ours.validated, fp32.validated, rtol=rtol, atol=0)
    for end in (lambda module: module.state_dict(), lambda module: module.saved):
        torch.testing.assert_close(end(ours), end(fp32), rtol=rtol, atol=1e-3)
    torch.testing.assert_close(ours.state_dict(), ours.saved, rtol=0, atol=1e-6)  # averages both, and FP32
    assert max(float((a - b).abs().max()) for a, b in zip(*map(_values, (ours, mlp())), strict=True)) > 1e-2


def _values(module: nn.Module) -> list[Tensor]:
    return [parameter.detach() for parameter in module.parameters()]


def test_schedule_free_goes_on_from_a_checkpoint_bit_for_bit(tmp_path: Path) -> None:
    batches = classification(10)
    plain, first, resumed = ScheduleFree(), ScheduleFree(), ScheduleFree()
    options: dict[str, Any] = {"num_sanity_val_steps": 0}
    trainer(MasterWeightPrecision("bf16-true"), max_epochs=2, **options).fit(plain, loader(batches), loader(batches))
    one = trainer(MasterWeightPrecision("bf16-true"), max_epochs=1, **options)

    class Saved(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "file.ckpt")

    one.callbacks.append(Saved())
    one.fit(first, loader(batches), loader(batches))
    two = trainer(MasterWeightPrecision("bf16-true"), max_epochs=2, **options)
    two.fit(resumed, loader(batches), loader(batches), ckpt_path=tmp_path / "file.ckpt")
    assert resumed.losses == plain.losses[10:]
    torch.testing.assert_close(resumed.state_dict(), plain.state_dict(), rtol=0, atol=0)


class Sharp(Classifier):
    """SAM, in manual optimization."""

    def __init__(self, base: Any, **options: Any) -> None:
        super().__init__(mlp(), lambda module: SAM(module.parameters(), base, **options))
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:  # type: ignore[override]
        x, y = batch
        optimizer: Any = self.optimizers()
        loss = F.cross_entropy(self(x), y)
        self.manual_backward(loss)
        optimizer.first_step(zero_grad=True)
        self.manual_backward(F.cross_entropy(self(x), y))
        optimizer.second_step(zero_grad=True)
        self.losses.append(loss.item())


@pytest.mark.parametrize(
    ("base", "options"),
    [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.AdamW, {"lr": 1e-2})],
    ids=["SGD", "AdamW"],
)
def test_sam_trains_as_in_fp32_in_bf16_and_is_refused_under_a_loss_scale(base: Any, options: dict[str, Any]) -> None:
    ours, fp32 = Sharp(base, **options), Sharp(base, **options)
    batches = classification(20)
    trainer(MasterWeightPrecision("bf16-true")).fit(ours, loader(batches))
    trainer().fit(fp32, loader(batches))
    torch.testing.assert_close(ours.losses, fp32.losses, rtol=2e-2, atol=2e-2)
    assert fp32.losses[-1] < 0.8 * fp32.losses[0]
    with pytest.raises(RuntimeError, match=r"SAM.first_step reads gradients outside of step.*'bf16-true'"):
        trainer(MasterWeightPrecision("16-true")).fit(Sharp(base, **options), loader(batches))


class Clipped(Sharp):
    """Clips before each part of a step, by the Trainer's way or by hand."""

    def __init__(self, *, by_hand: bool) -> None:
        super().__init__(torch.optim.SGD, lr=0.1)
        self._by_hand = by_hand

    def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        super().manual_backward(loss, *args, **kwargs)
        plugin = self.trainer.precision_plugin
        if not self._by_hand:
            self.clip_gradients(self.optimizers(), gradient_clip_val=0.05, gradient_clip_algorithm="norm")
        elif isinstance(plugin, MasterWeightPrecision):
            with plugin.true_gradients():
                nn.utils.clip_grad_norm_(self.parameters(), 0.05)
        else:
            nn.utils.clip_grad_norm_(self.parameters(), 0.05)


def test_clipping_that_is_noted_for_the_step_is_refused_and_what_the_message_says_works() -> None:
    with pytest.raises(RuntimeError, match=r"SAM.first_step reads.*clip_grad_norm_ within the plugin's true_gradients"):
        trainer(MasterWeightPrecision("bf16-true")).fit(Clipped(by_hand=False), loader(classification(1)))
    ours, fp32 = Clipped(by_hand=True), Clipped(by_hand=True)
    batches = classification(10)
    trainer(MasterWeightPrecision("bf16-true")).fit(ours, loader(batches))
    trainer().fit(fp32, loader(batches))
    moved = [sum((a - b).norm() for a, b in zip(_values(one), _values(mlp()), strict=True)) for one in (ours, fp32)]
    torch.testing.assert_close(*moved, rtol=2e-2, atol=0)


def test_in_fabric_too() -> None:
    ours, fp32 = mlp(), mlp()
    plugin = FabricMasterWeightPrecision("bf16-true")
    x, y = classification(1)[0]
    ends = []
    for module, fabric in ((ours, Fabric(accelerator="cpu", plugins=[plugin])), (fp32, Fabric(accelerator="cpu"))):
        model, optimizer = fabric.setup(module, SGDScheduleFree(module.parameters()))
        for _ in range(5):
            optimizer.zero_grad()
            fabric.backward(F.cross_entropy(model(x), y))
            optimizer.step()
        optimizer.eval()
        with torch.no_grad():
            ends.append(F.cross_entropy(model(x), y).item())
    plugin.restore()
    torch.testing.assert_close(*ends, rtol=2e-2, atol=0)
    torch.testing.assert_close(_values(ours), _values(fp32), rtol=2e-2, atol=1e-3)
