"""Any optimizer over FP32 masters: it must do what it would do on FP32 copies with true gradients."""

import copy
from abc import ABC
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mpt.bridge import BridgedOptimizer, bridge
from lightning_mpt.masters import MasterWeights

SCALE = 256.0


class Lion(torch.optim.Optimizer):
    """What a user might write: arXiv 2302.06675, knowing nothing of half precision."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["momentum"] = torch.zeros_like(p)
                    p.sub_(torch.sign(0.9 * state["momentum"] + 0.1 * p.grad), alpha=group["lr"])
                    state["momentum"].mul_(0.99).add_(p.grad, alpha=0.01)
        return loss


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "fused sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "lion": lambda p: Lion(p, lr=1e-3),
}


def parameters(dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    halves = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in [(7, 5), (3,)]]
    return [*halves, nn.Parameter(torch.randn(4, generator=generator))]  # one FP32, as BatchNorm's


def step_with(optimizer: Any, params: list[nn.Parameter], step: int, found_inf: float = 0.0) -> list[torch.Tensor]:
    """A step under a loss scale; gives the true gradients."""
    generator = torch.Generator().manual_seed(step)
    for parameter in params:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * SCALE).to(parameter.dtype)
    optimizer.grad_scale, optimizer.found_inf, optimizer.clip_value = torch.tensor(SCALE), torch.tensor(found_inf), 2.0
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf, optimizer.clip_value
    return [(p.grad.float() / SCALE).clamp(-2.0, 2.0) for p in params if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_optimizer_over_fp32_copies_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    params = parameters(dtype)
    copies = [nn.Parameter(parameter.detach().float().clone()) for parameter in params]
    ours, theirs = bridge(OPTIMIZERS[name](params), MasterWeights()), OPTIMIZERS[name](copies)
    for step in range(10):
        for fp32, gradient in zip(copies, step_with(ours, params, step), strict=True):
            fp32.grad = gradient
        theirs.step()
        torch.testing.assert_close(ours.master_params(), [c.detach() for c in copies], rtol=0, atol=0)
    for parameter, fp32 in zip(params, copies, strict=True):
        torch.testing.assert_close(parameter.float(), fp32.detach(), rtol=2**-8, atol=1e-6)  # its rounding
    assert ours.param_groups[0]["params"] == params  # seen from outside, the module's own


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_skipped_step_changes_nothing(name: str) -> None:
    params = parameters()
    optimizer = bridge(OPTIMIZERS[name](params), MasterWeights())
    step_with(optimizer, params, 0)
    before = copy.deepcopy((optimizer.state_dict(), [m.clone() for m in optimizer.master_params()], params))
    step_with(optimizer, params, 1, found_inf=1.0)
    torch.testing.assert_close(optimizer.state_dict()["state"], before[0]["state"], rtol=0, atol=0)
    torch.testing.assert_close(optimizer.master_params(), before[1], rtol=0, atol=0)
    torch.testing.assert_close(params, before[2], rtol=0, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_its_state_is_fp32_and_loads_again(name: str) -> None:
    params = parameters()
    optimizer = bridge(OPTIMIZERS[name](params), MasterWeights())
    for step in range(3):
        step_with(optimizer, params, step)
    saved = copy.deepcopy(optimizer.state_dict())
    floats = [v for state in saved["state"].values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert all(value.dtype == torch.float32 for value in floats)
    others = parameters()
    other = bridge(OPTIMIZERS[name](others), MasterWeights())
    other.load_state_dict(saved)
    torch.testing.assert_close(other.state_dict()["state"], saved["state"], rtol=0, atol=0)
    for state in other.state.values():
        for value in state.values():
            assert not isinstance(value, torch.Tensor) or value.dtype == torch.float32


def test_hooks_run_once_a_step_and_step_may_take_a_closure() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    bridged = bridge(optimizer, MasterWeights())
    step_with(bridged, params, 0)
    assert calls == ["pre", "post"]

    def closure() -> float:
        calls.append("closure")
        return 3.0

    assert bridged.step(closure) == 3.0
    assert calls == ["pre", "post", "closure", "pre", "post"]


def test_an_optimizer_that_asks_for_a_closure_is_given_one_that_runs_nothing_again() -> None:
    class Asks(torch.optim.SGD):
        def step(self, *, closure: Any, way: str) -> Any:  # type: ignore[override]  # only as Lightning gives it
            return closure(), way, super().step()

    calls: list[int] = []

    def closure() -> int:
        calls.append(len(calls))
        return len(calls)

    params = parameters()
    before = [parameter.detach().clone() for parameter in params]
    optimizer = bridge(Asks(params, lr=0.1), MasterWeights())
    for parameter in params:
        parameter.grad = torch.ones_like(parameter)
    assert optimizer.step(closure, way="down") == 1
    assert calls == [0]
    assert not any(torch.equal(parameter, start) for parameter, start in zip(params, before, strict=True))


def test_released_it_is_what_it_was_and_its_state_belongs_to_the_parameters() -> None:
    params = parameters()
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    bridged = bridge(optimizer, MasterWeights())
    assert bridged is optimizer
    assert isinstance(bridged, BridgedOptimizer)
    assert isinstance(bridged, torch.optim.SGD)
    step_with(bridged, params, 0)
    bridged.release()
    assert type(optimizer) is torch.optim.SGD
    assert set(optimizer.state) == set(params)
    mark = {"_opt_called"}  # torch's own, for its schedulers
    assert set(vars(optimizer)) - mark == set(vars(torch.optim.SGD(parameters(), lr=0.1)))


def test_a_weight_written_from_outside_is_where_its_master_goes_on() -> None:
    params = parameters()
    optimizer = bridge(torch.optim.SGD(params, lr=0.0), MasterWeights())
    step_with(optimizer, params, 0)
    with torch.no_grad():
        params[0].fill_(0.25)
    step_with(optimizer, params, 1)
    assert torch.equal(optimizer.master_params()[0], torch.full((7, 5), 0.25))
    assert torch.equal(params[0], torch.full((7, 5), 0.25, dtype=torch.bfloat16))


class AlsoAbstract(ABC, torch.optim.SGD):
    """As a whole library of optimizers has it: torch's class is not the first."""


def test_a_class_of_which_an_optimizer_is_not_the_first_base() -> None:
    params = parameters()
    optimizer = AlsoAbstract(params, lr=0.1)
    bridged = bridge(optimizer, MasterWeights())
    before = params[0].detach().clone()
    step_with(bridged, params, 0)
    assert isinstance(optimizer, AlsoAbstract)
    assert not torch.equal(params[0], before)
    bridged.release()
    assert type(optimizer) is AlsoAbstract
