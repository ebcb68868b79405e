"""The benchmarks' products of half tensors in FP32: each is the rounding of the true product."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.half_products import HalfProducts

ULPS = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half a unit in the last place of a number near 1; FP32 sums add next to nothing."""

LSTM_ULPS = {"half": 6, "autocast": 2}
"""Over twelve steps: a half LSTM rounds its cell state at every one. The worst of twenty seeds are 5.0 and 1.4."""


def operands(dtype: torch.dtype) -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "linear": (nn.Linear(64, 32), torch.randn(4, 7, 64)),
        "linear without bias": (nn.Linear(64, 32, bias=False), torch.randn(9, 64)),
        "convolution": (nn.Conv2d(8, 16, 3, padding=1), torch.randn(2, 8, 9, 9)),
    }


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("name", operands(torch.bfloat16))
def test_a_product_and_its_gradients_are_the_rounding_of_the_true_ones(name: str, dtype: torch.dtype) -> None:
    layer, x = operands(dtype)[name]
    layer, x = layer.to(dtype), x.to(dtype).requires_grad_()
    with HalfProducts():
        out = layer(x)
        grown = torch.randn_like(out)
        out.backward(grown)
    exact_layer = layer.double()
    ours = {"out": out, "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}}
    exact_x = x.detach().double().requires_grad_()
    for parameter in exact_layer.parameters():
        parameter.grad = None
    exact_out = exact_layer(exact_x)
    exact_out.backward(grown.double())
    exact = {"out": exact_out, "x": exact_x.grad, **{n: p.grad for n, p in exact_layer.named_parameters()}}
    for key, value in exact.items():
        assert value is not None
        mine = ours[key]
        assert mine is not None
        assert (mine.double() - value).abs().max() <= 1.1 * ULPS[dtype] * value.abs().max(), key


@pytest.mark.parametrize("dtype", ULPS)
def test_attention_is_near_that_of_float64(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 16, 8).to(dtype).requires_grad_() for _ in range(3))
    with HalfProducts():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out.sum().backward()
    assert out.dtype == q.grad.dtype == dtype  # type: ignore[union-attr]
    exact = [t.detach().double().requires_grad_() for t in (q, k, v)]
    exact_out = F.scaled_dot_product_attention(*exact, is_causal=True)
    exact_out.sum().backward()
    for mine, true in ((out, exact_out), (q.grad, exact[0].grad), (k.grad, exact[1].grad)):
        assert mine is not None
        assert true is not None
        assert (mine.double() - true).abs().max() <= 2.2 * ULPS[dtype] * true.abs().max()


def lstm_and_gradients(net: nn.LSTM, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out, (hidden, cell) = net(x)
    (out.float().square().mean() + (hidden * cell).float().sum()).backward()
    gradients = [x.grad, *(parameter.grad for parameter in net.parameters())]
    return [out, hidden, cell, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("dtype", ULPS)
@pytest.mark.parametrize("kind", LSTM_ULPS)
def test_an_lstm_is_near_that_of_float64(dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    net, x = nn.LSTM(16, 16, batch_first=True), torch.randn(4, 12, 16)
    if kind == "half":
        net, x = net.to(dtype), x.to(dtype)
    with HalfProducts(), torch.autocast("cpu", dtype, enabled=kind == "autocast"):
        ours = lstm_and_gradients(net, x)
    assert {value.dtype for value in ours[:3]} == {dtype}
    exact_net = nn.LSTM(16, 16, batch_first=True).double()
    exact_net.load_state_dict({name: value.to(dtype).double() for name, value in net.state_dict().items()})
    exact = lstm_and_gradients(exact_net, x.to(dtype).double())
    for mine, true in zip(ours, exact, strict=True):
        assert (mine.double() - true).abs().max() <= LSTM_ULPS[kind] * ULPS[dtype] * true.abs().max()


def test_what_is_not_half_stays_as_it_is() -> None:
    x = torch.randn(3, 4)
    with HalfProducts():
        assert torch.equal(x @ x.T, torch.mm(x, x.T))
        assert (x @ x.T).dtype == torch.float32
