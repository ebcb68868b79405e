"""A converted module: half inside, FP32 for whoever saves it, loads it, or gets it back."""

import copy
import warnings
from typing import Any

import pytest
import torch
from stepping import HALVES, assert_same
from torch import nn

from lightning_mpt import MasterAdamW
from lightning_mpt.conversion import ConvertedModule
from lightning_mpt.masters import MasterWeights
from lightning_mpt.storage import master_storage


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(5, 8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LayerNorm(8))
        self.head = nn.Linear(8, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.tensor([0.0, -1e9, float("-inf")]))
        self.register_buffer("sin", torch.linspace(0, 1, 11).sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(self.embedding(x)))


def convert(
    net: nn.Module, dtype: torch.dtype = torch.bfloat16, **options: Any
) -> tuple[ConvertedModule, MasterWeights]:
    masters = MasterWeights()
    return ConvertedModule(net, dtype, masters, **options), masters


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_it_is_half_in_place_and_restored_bit_for_bit(dtype: torch.dtype) -> None:
    net = Net()
    parameters, before = list(net.parameters()), copy.deepcopy(net.state_dict())
    sin = net.sin.clone()
    converted, _ = convert(net, dtype)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert net.head.weight is net.embedding.weight
    fp32 = {name for name, tensor in [*net.named_parameters(), *net.named_buffers()] if tensor.dtype == torch.float32}
    assert fp32 == {f"body.1.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert net(torch.tensor([1, 2])).dtype == dtype
    net.train(False)
    converted.restore()
    assert_same(net.sin, sin)
    before["body.1.running_mean"], before["body.1.running_var"] = net.body[1].running_mean, net.body[1].running_var
    before["body.1.num_batches_tracked"] = net.body[1].num_batches_tracked
    assert_same(dict(net.state_dict()), dict(before))


@pytest.mark.parametrize("storage", ["split", "float32"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_its_state_dict_is_fp32_whole_or_in_part(dtype: torch.dtype, storage: str) -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    converted, masters = convert(net, dtype)
    for parameter in converted.parameters:
        masters.claim(parameter, master_storage(storage))
    state = net.state_dict()
    if dtype == torch.bfloat16 or storage == "float32":
        assert_same(dict(state), dict(before))
        assert_same(net.body[0].state_dict()["weight"], before["body.0.weight"])
    torch.testing.assert_close(dict(state), dict(before), rtol=0, atol=2.0**-40)
    assert state["head.weight"].data_ptr() == state["embedding.weight"].data_ptr()  # saved once


@pytest.mark.parametrize("storage", ["split", "float32"])
def test_loading_fp32_values_keeps_all_their_bits(storage: str) -> None:
    net = Net()
    converted, masters = convert(net)
    for parameter in converted.parameters:
        masters.claim(parameter, master_storage(storage))
    torch.manual_seed(1)
    loaded = {
        name: torch.randn_like(value) if value.is_floating_point() else value
        for name, value in Net().state_dict().items()
    }
    loaded["head.weight"] = loaded["embedding.weight"]
    net.load_state_dict(loaded)
    parameters = dict(net.named_parameters())
    for name in ("embedding.weight", "body.0.weight", "body.0.bias", "body.2.weight"):
        assert_same(masters.read(parameters[name]), loaded[name])
        torch.testing.assert_close(parameters[name].float(), loaded[name], rtol=2**-8, atol=0)
    converted.restore()
    for name in ("embedding.weight", "body.0.weight", "body.1.weight"):
        assert_same(net.state_dict()[name], loaded[name])


def test_buffers_saturate_rather_than_overflow_and_come_back_unless_written() -> None:
    net = Net()
    converted, _ = convert(net, torch.float16)
    assert net.mask.tolist() == [0.0, -65504.0, float("-inf")]
    net.sin.mul_(2)
    doubled = net.sin.float()
    converted.restore()
    assert net.mask.tolist() == [0.0, -1e9, float("-inf")]
    assert_same(net.sin, doubled)


def test_named_types_stay_fp32_with_casts_around_them() -> None:
    net = Net()
    seen = []
    net.body[2].register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    converted, _ = convert(net, fp32_modules=(nn.LayerNorm, nn.BatchNorm1d))
    net.body[2].register_forward_hook(lambda module, args, output: seen.append((args[0].dtype, output.dtype)))
    assert net.body[2].weight.dtype == torch.float32
    assert net(torch.tensor([1, 2])).dtype == torch.bfloat16
    assert seen == [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)]
    converted.restore()


def test_a_whole_branch_stays_fp32_where_its_type_is_named() -> None:
    class Branch(nn.Sequential):
        pass

    net = nn.Sequential(nn.Linear(4, 4), Branch(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 4))
    converted, _ = convert(net, fp32_modules=(Branch,))
    assert {name for name, p in net.named_parameters() if p.dtype == torch.float32} == {
        name for name, _ in net.named_parameters() if name.startswith("1.")
    }
    assert net(torch.randn(2, 4).bfloat16()).dtype == torch.bfloat16
    converted.restore()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_parameters_are_named_and_become_fp32(dtype: torch.dtype) -> None:
    net = Net()
    net.body[0].half()
    values = net.body[0].weight.detach().float()
    converted, _ = convert(net, dtype)
    assert converted.was_half == ["body.0.weight", "body.0.bias"]
    assert net.body[0].weight.dtype == dtype
    converted.restore()
    assert_same(net.body[0].weight.detach(), values)


def test_gradients_widen_where_they_are_added_to_and_are_half_again_afterwards() -> None:
    layer = nn.Linear(3, 1)
    converted, _ = convert(layer)
    for expected in (torch.bfloat16, torch.float32):
        converted.widen_gradients()
        layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == expected
    layer.zero_grad()
    converted.widen_gradients()
    layer(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    assert layer.weight.grad.dtype == torch.bfloat16
    converted.restore()
    layer(torch.ones(1, 3)).sum().backward()
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("part", "error", "message"),
    [
        (nn.Linear(2, 2, dtype=torch.float64), TypeError, "part.weight is torch.float64"),
        (nn.Embedding(3, 3, sparse=True), ValueError, "part has sparse=True.*make it sparse=False"),
        (nn.EmbeddingBag(3, 3, sparse=True), ValueError, "part has sparse=True"),
        (nn.LazyLinear(3), ValueError, "part.weight has no shape yet: run one batch"),
    ],
    ids=["float64", "embedding", "embedding bag", "lazy"],
)
def test_what_cannot_be_trained_is_refused_before_anything_changes(part: nn.Module, error: Any, message: str) -> None:
    net = Net()
    net.part = part
    with pytest.raises(error, match=message):
        convert(net)
    assert net.body[0].weight.dtype == torch.float32
    assert not net._state_dict_hooks


class Scripted(nn.Module):
    """With a part that torch.jit.script has compiled."""

    def __init__(self) -> None:
        super().__init__()
        part = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.GELU())
        part.register_buffer("scale", torch.full((8,), 0.1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch's: people have such modules in files
            self.part = torch.jit.script(part)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.part(x) * self.part.scale


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_scripted_part_is_converted_saved_loaded_and_restored_like_any_other(dtype: torch.dtype) -> None:
    net, other = Scripted(), Scripted()
    start = copy.deepcopy(net.state_dict())
    converted, _ = convert(net, dtype)
    assert net(torch.randn(2, 8, dtype=dtype)).dtype == dtype
    assert {tensor.dtype for tensor in (*net.parameters(), *net.buffers())} == {dtype}
    assert_same(net.state_dict(), start)
    net.load_state_dict(other.state_dict())
    assert_same(net.state_dict(), other.state_dict())
    converted.restore()
    assert_same(net.state_dict(), other.state_dict())
    assert {tensor.dtype for tensor in net.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_buffers_of_every_kind_come_back(dtype: torch.dtype) -> None:
    kinds = {
        "nan": torch.tensor([float("nan"), -1e9, 1 / 3]),
        "float16": torch.ones(3, dtype=torch.float16),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "whole": torch.arange(3),
    }
    net = nn.Linear(2, 2)
    for name, buffer in kinds.items():
        net.register_buffer(name, buffer)
    converted, _ = convert(net, dtype)
    held = {name: buffer.dtype for name, buffer in net.named_buffers()}
    assert held == {"nan": dtype, "float16": dtype, "float8": torch.float8_e4m3fn, "whole": torch.int64}
    converted.restore()
    torch.testing.assert_close(net.nan, kinds["nan"], rtol=0, atol=0, equal_nan=True)
    assert net.float16.dtype == torch.float32  # as all that comes in half
    assert net.float8 is kinds["float8"]
    assert net.whole is kinds["whole"]


@pytest.mark.parametrize("frozen", [torch.uint8, torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_frozen_parameters_of_other_types_are_left_alone(frozen: torch.dtype) -> None:
    net = nn.Linear(2, 2)
    net.table = nn.Parameter(torch.ones(3).to(frozen), requires_grad=False)
    converted, masters = convert(net)
    optimizer = MasterAdamW.adopt(torch.optim.AdamW(net.parameters(), lr=0.1), masters, "split", "float32")
    net(torch.ones(1, 2, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    assert net.table.dtype == frozen
    assert net.weight.dtype == torch.bfloat16
    optimizer.release()
    converted.restore()
    assert (net.table.dtype, net.weight.dtype) == (frozen, torch.float32)


def test_gradients_of_either_type_may_be_assigned() -> None:
    net = nn.Linear(2, 2)
    converted, _ = convert(net)
    x = torch.ones(1, 2, dtype=torch.bfloat16)
    for _ in range(2):
        converted.widen_gradients()
        net(x).sum().backward()
    assert net.weight.grad is not None
    assert net.weight.grad.dtype == torch.float32
    net.weight.grad = torch.zeros_like(net.weight)
    net(x).sum().backward()
    assert net.weight.grad.dtype == torch.bfloat16
