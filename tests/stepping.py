"""Parameters, gradients and steps for the tests of MasterAdamW alone."""

from typing import Any

import torch
from torch import nn

from lightning_mpt import MasterAdamW

HALVES = (torch.bfloat16, torch.float16)
STORAGES = ("split", "float32")


def parameters(dtype: torch.dtype, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(17, 23), (1,), (64,), ()]
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in params:
        parameter.grad = (torch.randn(parameter.shape, generator=generator) * 0.1).to(parameter.dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: range) -> None:
    for step in steps:
        set_gradients(params, step)
        optimizer.step()


def snapshot(optimizer: MasterAdamW, params: list[nn.Parameter]) -> Any:
    state = [{name: value.clone() for name, value in optimizer.state[p].items()} for p in params]
    return [p.detach().clone() for p in params], [m.clone() for m in optimizer.master_params()], state


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)
