"""Optimizers that hold parameters elsewhere than in their groups, or give them other memory."""

import copy
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_bridge import parameters, step_with
from torch import Tensor, nn
from training import Classifier, classification, fit, mlp
from unusual_optimizers import SAM, Decays, KeepsADictionary, KeepsAList, Lookahead, OldStyle

from lightning_mpt import MasterWeightPrecision
from lightning_mpt.bridge import bridge
from lightning_mpt.exchange import exchanged, optimizers_within
from lightning_mpt.masters import MasterWeights
from lightning_mpt.storage import master_storage

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "a list of its own": KeepsAList,
    "a dictionary by parameter": KeepsADictionary,
    "another inside": Lookahead,
    "new tensors": OldStyle,
    "no gradients": Decays,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_optimizer_over_fp32_copies_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    params.insert(0, nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(9)).to(dtype)))  # no gradient
    copies = [nn.Parameter(parameter.detach().float().clone()) for parameter in params]
    ours, theirs = bridge(OPTIMIZERS[name](params), MasterWeights()), OPTIMIZERS[name](copies)
    for step in range(10):
        for fp32, gradient in zip(copies[1:], step_with(ours, params[1:], step), strict=True):
            fp32.grad = gradient
        theirs.step()
        torch.testing.assert_close(ours.master_params(), [c.detach() for c in copies], rtol=0, atol=0)
        for parameter, fp32 in zip(params, copies, strict=True):
            torch.testing.assert_close(parameter.float(), fp32.detach(), rtol=2**-8, atol=1e-6)  # its rounding
    ours.release()
    places = {name: value for name, value in vars(ours).items() if name != "state"}
    assert exchanged(places, {p: Tensor() for p in params}) is not places
    for one in optimizers_within(ours):
        assert set(one.state) <= set(params)
        assert set(vars(one)) - {"_opt_called"} == set(vars(type(one)(copies)))
        assert not one._optimizer_step_pre_hooks
    if name == "a dictionary by parameter":
        assert list(ours._momentum) == params
        assert [p for _, p in ours._pairs["all"]] == params


def test_other_tensors_in_the_place_of_some_wherever_they_are() -> None:
    Pair = namedtuple("Pair", "first second")
    a, b, other = torch.zeros(1), torch.zeros(1), torch.ones(1)
    value = {
        "list": [a, 1, (b, a)],
        "named": Pair(a, None),
        "set": {a, b},
        "keys": OrderedDict({a: "x", b: a}),
        "default": defaultdict(list, {"y": [a]}),
        "none": [b, "z"],
    }
    made = exchanged(value, {a: other})
    assert made["list"] == [other, 1, (b, other)]
    assert made["named"] == Pair(other, None)
    assert made["set"] == {other, b}
    assert list(made["keys"].items()) == [(other, "x"), (b, other)]
    assert made["default"]["y"] == [other]
    assert made["default"]["missing"] == []
    assert made["none"] is value["none"]
    assert value["list"][0] is a  # type: ignore[index]  # the first one is as it was
    assert exchanged(value, {torch.zeros(1): other}) is value


class Wrapped(torch.optim.SGD):
    """Keeps the parameters where nobody finds them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.update = lambda: [p.add_(p.grad, alpha=-0.1) for p in parameters]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.update()


def test_an_optimizer_that_writes_to_the_half_weights_is_refused() -> None:
    params = parameters()
    optimizer = bridge(Wrapped(params), MasterWeights())
    with pytest.raises(RuntimeError, match=r"Wrapped.step wrote to half weights.*\(7, 5\).*self.param_groups.*32-true"):
        step_with(optimizer, params, 0)


def test_a_backward_within_a_step_is_refused() -> None:
    params = parameters()
    optimizer = bridge(torch.optim.SGD(params, lr=0.1), MasterWeights())
    optimizer.register_step_pre_hook(lambda *_: params[0].sum().backward())
    with pytest.raises(RuntimeError, match=r"SGD.step wrote to half gradients"):
        step_with(optimizer, params, 0)


def test_an_optimizer_inside_is_not_stepped_on_its_own() -> None:
    params = parameters()
    optimizer = Lookahead(params)
    bridge(optimizer, MasterWeights())
    with pytest.raises(RuntimeError, match=r"SGD inside Lookahead was stepped on its own"):
        optimizer.optimizer.step()


@pytest.mark.parametrize("moves", [True, False], ids=["weights moved", "gradients gone"])
def test_a_loss_that_is_asked_for_again_is_refused(moves: bool) -> None:
    class Again(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            assert closure is not None
            loss = closure()
            if moves:
                super().step()
            else:
                self.zero_grad()
            return loss + closure()

    params = parameters()
    optimizer = bridge(Again(params, lr=0.1), MasterWeights())
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(RuntimeError, match=r"Again.step asks for the loss again.*manual optimization"):
        optimizer.step(lambda: 1.0)


def test_a_hook_may_change_the_gradients_before_a_step_that_asks_for_the_loss() -> None:
    params = parameters()
    optimizer = bridge(KeepsAList(params), MasterWeights())
    optimizer.register_step_pre_hook(lambda one, *_: one.zero_grad(set_to_none=False))
    before = [parameter.detach().clone() for parameter in params]
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    assert optimizer.step(lambda: 1.0) == 1.0
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0, atol=0)


def test_gradients_that_a_step_lets_go_of_are_gone() -> None:
    params = parameters()
    optimizer = bridge(torch.optim.SGD(params, lr=0.1), MasterWeights())
    optimizer.register_step_post_hook(lambda one, *_: one.zero_grad())
    step_with(optimizer, params, 0)
    assert all(parameter.grad is None for parameter in params)


def test_the_state_of_an_optimizer_inside_is_named_for_the_profiler() -> None:
    params = parameters()
    optimizer = Lookahead(params)
    bridged = bridge(optimizer, MasterWeights())
    step_with(bridged, params, 0)
    whose = [whose for category, _, whose in bridged.memory_categories() if category == "optimizer_state"]
    assert sum(one is params[0] for one in whose) == 2  # the momentum and the slow weights


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_a_trainer_with_an_optimizer_that_keeps_a_list_follows_fp32(precision: Any) -> None:
    ours, fp32 = (Classifier(mlp(), lambda module: KeepsAList(module.parameters())) for _ in range(2))
    batches = classification(20)
    fit(ours, batches, MasterWeightPrecision(precision, loss_scale=None if precision == "bf16-true" else 1024.0))
    fit(fp32, batches)
    torch.testing.assert_close(ours.losses, fp32.losses, rtol=2e-2, atol=0)
    assert fp32.losses[-1] < 0.95 * fp32.losses[0]


def test_clipping_reaches_an_optimizer_with_another_in_the_attribute_optimizer() -> None:
    ours, fp32 = (Classifier(mlp(), lambda module: Lookahead(module.parameters())) for _ in range(2))
    batches = classification(20)
    fit(ours, batches, MasterWeightPrecision("bf16-true"), gradient_clip_val=0.01)
    fit(fp32, batches, gradient_clip_val=0.01)
    moved = [
        [(end - start).detach().norm() for end, start in zip(module.parameters(), mlp().parameters(), strict=True)]
        for module in (ours, fp32)
    ]
    torch.testing.assert_close(*moved, rtol=2e-2, atol=0)


def test_sam_within_automatic_optimization_is_refused() -> None:
    module = Classifier(mlp(), lambda module: SAM(module.parameters(), torch.optim.SGD, lr=0.1))
    with pytest.raises(RuntimeError, match=r"SAM.step asks for the loss again"):
        fit(copy.deepcopy(module), classification(2), MasterWeightPrecision("bf16-true"))


class ByData(torch.optim.SGD):
    """Takes its parameters from elsewhere, and writes where no version counts."""

    def __init__(self, params: list[nn.Parameter], *, gradients: bool) -> None:
        super().__init__(params, lr=0.1)
        self._elsewhere, self._gradients = lambda: params, gradients

    def step(self, closure: Any = None) -> Any:
        for parameter in self._elsewhere():
            assert parameter.grad is not None
            (parameter.grad if self._gradients else parameter).data.mul_(0.5)
        return super().step(closure) if self._gradients else None


@pytest.mark.parametrize(("gradients", "what"), [(False, "weights"), (True, "gradients")])
def test_writes_past_the_groups_by_data_are_an_error(gradients: bool, what: str) -> None:
    params = parameters()
    optimizer = bridge(ByData(params, gradients=gradients), MasterWeights())
    with pytest.raises(RuntimeError, match=rf"ByData.step wrote to half {what} of the module"):
        step_with(optimizer, params, 0)


class Freezes(torch.optim.SGD):
    def freeze_first(self) -> None:
        self.param_groups[0]["params"] = self.param_groups[0]["params"][1:]


def test_a_method_may_take_parameters_out_of_a_group() -> None:
    params = parameters()
    start = [parameter.detach().clone() for parameter in params]
    optimizer = bridge(Freezes(params, lr=0.1), MasterWeights())
    held = optimizer.param_groups[0]["params"]
    step_with(optimizer, params, 0)
    assert optimizer.param_groups[0]["params"] is held
    optimizer.freeze_first()  # type: ignore[attr-defined]
    assert [id(one) for one in optimizer.param_groups[0]["params"]] == [id(one) for one in params[1:]]
    frozen = params[0].detach().clone()
    step_with(optimizer, params, 1)
    assert torch.equal(params[0], frozen)
    assert not any(torch.equal(before, after) for before, after in zip(start, params, strict=True))


class Anchored(torch.optim.SGD):
    """Pulls weights back to copies that it made of them, as Lookahead's slow weights are."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        super().__init__(params, lr=0.1)
        self.anchors = [[parameter.detach().clone() for parameter in params]]
        self.param_groups[0]["first"] = self.anchors[0][0]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for anchor, parameter in zip(self.anchors[0], self.param_groups[0]["params"], strict=True):
            anchor.lerp_(parameter, 0.5)
            parameter.copy_(anchor)
        return loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_copies_of_half_weights_that_it_made_are_their_masters(dtype: torch.dtype) -> None:
    params, masters = parameters(dtype), MasterWeights()
    fp32 = [torch.randn(p.shape, generator=torch.Generator().manual_seed(7)) for p in params]
    for parameter, value in zip(params, fp32, strict=True):
        parameter.data.copy_(value)
        if parameter.dtype == dtype:
            masters.write(parameter, value.clone(), master_storage("float32"))
    copies = [nn.Parameter(value) for value in fp32]
    ours, theirs = bridge(Anchored(params), masters), Anchored(copies)
    assert ours.param_groups[0]["first"] is ours.anchors[0][0]  # type: ignore[attr-defined]
    for step in range(5):
        for copied, gradient in zip(copies, step_with(ours, params, step), strict=True):
            copied.grad = gradient
        theirs.step()
        torch.testing.assert_close(ours.master_params(), [c.detach() for c in copies], rtol=0, atol=0)
