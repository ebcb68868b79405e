"""What stays FP32 among half modules, and how it meets them."""

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_mpt import MasterWeightPrecision
from lightning_mpt.conversion import ConvertedModule
from lightning_mpt.fp32_functions import FP32Functions
from lightning_mpt.masters import MasterWeights
from lightning_mpt.numerics import default_dtype
from tests.training import Classifier, classification, fit, mlp

POSITIONS = 2048


class Rotary(nn.Module):
    """As it is written in many a model: sines and cosines in the type of the frequencies."""

    def __init__(self, width: int, *, learnt: bool = False) -> None:
        super().__init__()
        frequencies = 10000 ** -(torch.arange(0, width, 2) / width).float()
        self.register_buffer("inv_freq", frequencies, persistent=False)
        if learnt:
            self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        angles = torch.outer(torch.arange(x.shape[-2]).to(self.inv_freq), self.inv_freq)
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()


class Attention(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.rotary, self.qkv = Rotary(width), nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = self.rotary(x)
        q, k, v = self.qkv(x).chunk(3, -1)
        first, second = k.chunk(2, -1)
        return F.scaled_dot_product_attention(q * cos, k * cos + torch.cat((-second, first), -1) * sin, v)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_angles_of_far_positions_are_those_of_fp32(dtype: torch.dtype) -> None:
    rotary, x = Rotary(16), torch.zeros(POSITIONS, 16)
    cos, sin = rotary(x)
    converted = ConvertedModule(nn.Sequential(rotary), dtype, MasterWeights())
    for half, fp32 in zip(rotary(x.to(dtype)), (cos, sin), strict=True):
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), fp32, rtol=0, atol=torch.finfo(dtype).eps)
    converted.restore()
    assert torch.equal(rotary(x)[0], cos)


class Angles(Rotary):
    """Leaves sines and cosines to others."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return torch.outer(torch.arange(x.shape[-2]).to(self.inv_freq), self.inv_freq)


def test_angles_alone_stay_fp32() -> None:
    angles, x = Angles(16), torch.zeros(POSITIONS, 16)
    expected = angles(x)
    ConvertedModule(nn.Sequential(angles), torch.bfloat16, MasterWeights())
    assert torch.equal(angles(x.bfloat16()), expected)


def test_what_has_weights_beside_its_frequencies_is_half() -> None:
    rotary = Rotary(16, learnt=True)
    ConvertedModule(rotary, torch.bfloat16, MasterWeights())
    assert rotary.inv_freq.dtype == rotary.scale.dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_attention_of_ones_own_trains(precision: Any) -> None:
    batches = [(x.unsqueeze(1).repeat(1, 5, 1), y) for x, y in classification(4)]
    net = nn.Sequential(Attention(), nn.Flatten(), nn.Linear(5 * 16, 4))
    fit(Classifier(net), batches, MasterWeightPrecision(precision))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_llama_sees_the_positions_that_it_saw_in_fp32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=POSITIONS, **sizes))
    x, positions = torch.zeros(1, POSITIONS, 32), torch.arange(POSITIONS)[None]
    fp32 = llama.model.rotary_emb(x, positions)
    ConvertedModule(llama, dtype, MasterWeights())
    for half, expected in zip(llama.model.rotary_emb(x.to(dtype), positions), fp32, strict=True):
        assert half.dtype == dtype
        torch.testing.assert_close(half.float(), expected, rtol=0, atol=torch.finfo(dtype).eps)


class Codebook(nn.Module):
    """Running sums, of numbers that are made in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.linspace(-1, 1, 8)[:, None].repeat(1, 16))
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("hits", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        chosen = (x.detach()[:, None] - self.codes).square().sum(-1).argmin(1)
        decay = torch.tensor(0.999)
        self.mean.mul_(decay).add_(1 - decay)
        self.hits.index_add_(0, chosen, torch.ones(len(chosen)))
        return x + 0 * self.codes[chosen]


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_what_a_module_kept_in_fp32_makes_is_fp32(precision: Any) -> None:
    kept = []
    for plugin in (None, MasterWeightPrecision(precision, fp32_modules=Codebook)):
        net = nn.Sequential(Codebook(), mlp())
        fit(Classifier(net), classification(20), plugin)
        kept.append((net[0].mean, net[0].hits.sum()))
    torch.testing.assert_close(kept[1], kept[0])


def test_the_default_type_is_half_again_where_such_a_module_fails() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert torch.zeros(()).dtype == torch.float32
            raise ArithmeticError

    net = nn.Sequential(Fails())
    ConvertedModule(net, torch.bfloat16, MasterWeights(), fp32_modules=(Fails,))
    with default_dtype(torch.bfloat16):
        with pytest.raises(ArithmeticError):
            net(torch.zeros(1))
        assert torch.get_default_dtype() == torch.bfloat16


class ConditionalNorm(nn.BatchNorm1d):
    """A norm with layers of its own, and arithmetic on what it keeps in FP32."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.scale, self.act = nn.Linear(width, width), nn.PReLU(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.act((1 + self.scale(x)) * super().forward(x) + self.weight * self.running_mean)


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_a_norm_with_layers_of_its_own_trains_as_in_fp32(precision: Any) -> None:
    losses = []
    for plugin in (None, MasterWeightPrecision(precision)):
        torch.manual_seed(0)
        module = Classifier(nn.Sequential(ConditionalNorm(16), nn.Linear(16, 4)))
        fit(module, classification(5), plugin)
        losses.append(torch.tensor(module.losses))
    torch.testing.assert_close(losses[1], losses[0], rtol=0.02, atol=0.02)


def test_only_what_runs_in_a_norm_is_fp32() -> None:
    net = nn.Sequential(ConditionalNorm(16))
    ConvertedModule(net, torch.bfloat16, MasterWeights())
    fp32 = {name for name, tensor in [*net.named_parameters(), *net.named_buffers()] if tensor.dtype == torch.float32}
    assert fp32 == {f"0.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    with FP32Functions():
        assert net(torch.ones(4, 16, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_copies_of_what_meets_half_meet_it_too() -> None:
    net = nn.Sequential(ConditionalNorm(16), Codebook(), nn.Linear(16, 16), Attention())
    ConvertedModule(net, torch.bfloat16, MasterWeights(), fp32_modules=(Codebook, nn.BatchNorm1d))
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with default_dtype(torch.bfloat16), FP32Functions():
        twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
        expected = net(x)
        for twin in twins:
            assert torch.equal(twin(x), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_a_compiled_module_makes_fp32_in_what_is_kept_so() -> None:
    net = nn.Sequential(nn.Linear(16, 16), Codebook())
    ConvertedModule(net, torch.bfloat16, MasterWeights(), fp32_modules=Codebook)
    twin = copy.deepcopy(net)
    compiled = torch.compile(twin, backend="eager")
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    with default_dtype(torch.bfloat16), FP32Functions():
        torch.testing.assert_close(compiled(x), net(x))
        assert torch.get_default_dtype() == torch.bfloat16
    assert torch.equal(twin[1].mean, net[1].mean)
    assert net[1].mean > 0
