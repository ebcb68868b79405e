"""Compiled functions take what stands for an FP32 copy as that copy, and give it back as such."""

import pytest
import torch
from halves import Step, half
from torch import Tensor

from lightning_mpt.upcast import half_values, upcast


def in_compiled(function: Step) -> Step:
    result: Step = torch.compile(function, backend="aot_eager")
    return result


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("part", [lambda x: x, lambda x: x[1:, ::2], lambda x: x.t()], ids=["all", "part", "turned"])
@pytest.mark.parametrize(
    "function",
    [lambda x: x[1:].contiguous(), lambda x: x.view_as(x), lambda x: (x[1:], x.exp())[0], lambda x: x.clone()],
    ids=["part", "same", "two", "copy"],
)
def test_compiled_functions_take_it_and_give_it_back(part: Step, function: Step) -> None:
    torch._dynamo.reset()
    gradients = []
    for ours in (True, False):
        leaf = half()
        x = part((upcast if ours else Tensor.float)(leaf * 2))  # type: ignore[operator]
        (in_compiled(function)(x) * 2 if ours else function(x) * 2).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)  # type: ignore[arg-type]


def test_what_a_compiled_function_writes_is_seen() -> None:
    torch._dynamo.reset()
    x = upcast(half() * 2)
    in_compiled(lambda x: x.mul_(2))(x.detach())
    assert half_values(x) is None
    assert torch.equal(x + 0, half() * 4.0)


def test_compiled_code_is_for_one_shape() -> None:
    """It is found again by this name, in later processes too."""
    x = upcast(half() * 2)
    names = {y._stable_hash_for_caching() for y in (x, x[1:], x[:, 1:], x.t(), x.detach())}  # type: ignore[attr-defined]
    assert len(names) == 5
