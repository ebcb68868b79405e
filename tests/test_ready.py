"""What is kept ready from step to step is noticed to be out of date, whatever was changed behind its back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mpt import MasterAdamW

SHAPES = ((300,), (7, 11), (2049,))
STORAGES: dict[str, dict[str, Any]] = {
    "exact": {},
    "float32 masters": {"master_weights": "float32"},
    "compact": {"master_weights": "split8", "optimizer_state": "8bit"},
}


def state_lies_elsewhere(optimizer: MasterAdamW, first: nn.Parameter) -> None:
    """As functions that move an optimizer to a device do it."""
    for entry in optimizer.state.values():
        for value in entry.values():
            value.data = value.data.clone()


def state_is_other_tensors(optimizer: MasterAdamW, first: nn.Parameter) -> None:
    for parameter, entry in optimizer.state.items():
        optimizer.state[parameter] = {name: value.clone() for name, value in entry.items()}


def scales_are_halved(optimizer: MasterAdamW, first: nn.Parameter) -> None:
    entry = optimizer.state[first]
    for name in [name for name in entry if name.startswith("exp_avg")]:
        if entry[name].is_floating_point():
            entry[name] = entry[name] * 0.5


def a_parameter_lies_elsewhere(optimizer: MasterAdamW, first: nn.Parameter) -> None:
    first.data = first.data.clone()


def a_parameter_is_turned(optimizer: MasterAdamW, first: nn.Parameter) -> None:
    first.data = first.data.view(30, 10).t().contiguous().view(-1)


def a_parameter_was_written(optimizer: MasterAdamW, first: nn.Parameter) -> None:
    with torch.no_grad():
        first.clamp_(-0.5, 0.5)


def state_is_gone(optimizer: MasterAdamW, first: nn.Parameter) -> None:
    del optimizer.state[first]


CHANGES = (
    state_lies_elsewhere,
    state_is_other_tensors,
    scales_are_halved,
    a_parameter_lies_elsewhere,
    a_parameter_is_turned,
    a_parameter_was_written,
    state_is_gone,
)


def trained(change: Callable[[MasterAdamW, nn.Parameter], None], storage: str, *, kept: bool) -> list[torch.Tensor]:
    """Weights, masters and state after steps before and after a change."""
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in SHAPES]
    optimizer = MasterAdamW(parameters, lr=1e-2, **STORAGES[storage])
    for step in range(5):
        if step == 3:
            change(optimizer, parameters[0])
        if not kept:
            optimizer.__dict__.pop("_ready", None)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16()
        optimizer.step()
    values = [value for entry in optimizer.state.values() for value in entry.values()]
    return [*(parameter.detach() for parameter in parameters), *optimizer.master_params(), *values]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_behind_its_back_is_noticed(
    change: Callable[[MasterAdamW, nn.Parameter], None],
    kernel: str,
    storage: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if kernel == "triton":
        request.getfixturevalue("triton_kernel")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    kept, anew = (trained(change, storage, kept=kept) for kept in (True, False))
    torch.testing.assert_close(kept, anew, rtol=0, atol=0)


def test_a_parameter_that_has_shrunk_is_no_longer_written_beyond_its_end() -> None:
    parameter = nn.Parameter(torch.ones(300).bfloat16())
    optimizer = MasterAdamW([parameter], lr=1e-2)
    whole = parameter.data
    for step in range(3):
        if step == 2:
            before = whole[100:].clone()
            parameter.data = whole[:100]
            optimizer.state.clear()
            optimizer.masters.drop(parameter)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert torch.equal(whole[100:], before)
