"""FP32 sums and losses, and global switches that are afterwards what they were."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lightning_mpt.fp32_functions import LOSSES, FP32Functions, warn_of_probabilities
from lightning_mpt.numerics import default_dtype, fp32_sums

MATMUL = torch.backends.cuda.matmul


def switches() -> tuple[Any, ...]:
    return (
        MATMUL.allow_fp16_reduced_precision_reduction,
        MATMUL.allow_bf16_reduced_precision_reduction,
        MATMUL.allow_fp16_accumulation,
        torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed(),
        torch.get_default_dtype(),
    )


@pytest.mark.parametrize("before", [True, False])
def test_switches_are_off_within_and_what_they_were_afterwards(before: bool) -> None:
    original = switches()
    try:
        MATMUL.allow_fp16_reduced_precision_reduction = before
        MATMUL.allow_bf16_reduced_precision_reduction = before
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
        state = switches()
        with pytest.raises(ArithmeticError), default_dtype(torch.bfloat16), fp32_sums():  # noqa: PT012
            assert switches() == (False, False, False, False, torch.bfloat16)
            raise ArithmeticError
        assert switches() == state
    finally:
        MATMUL.allow_fp16_reduced_precision_reduction = original[0]
        MATMUL.allow_bf16_reduced_precision_reduction = original[1]
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(original[3])


def half(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(len(shape))).clamp(0.01, 0.99).bfloat16()


SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0])
CALLS: dict[Callable[..., Tensor], tuple[Any, ...]] = {
    F.binary_cross_entropy: (half(4), half(4)),
    F.binary_cross_entropy_with_logits: (half(4), half(4)),
    F.cosine_embedding_loss: (half(4, 3), half(4, 3).flip(0), SIGNS),
    F.cross_entropy: (half(4, 3), torch.tensor([0, 1, 2, 0])),
    F.ctc_loss: (
        half(9, 2, 5).log_softmax(2),
        torch.ones(2, 3, dtype=torch.long),
        torch.tensor([9, 9]),
        torch.tensor([3, 2]),
    ),
    F.gaussian_nll_loss: (half(4), half(4).flip(0), half(4)),
    F.hinge_embedding_loss: (half(4), SIGNS.bfloat16()),
    F.huber_loss: (half(4), half(4).flip(0)),
    F.kl_div: (half(4).log(), half(4).flip(0), None, None, "batchmean"),
    F.l1_loss: (half(4), half(4).flip(0)),
    F.margin_ranking_loss: (half(4), half(4).flip(0), SIGNS.bfloat16()),
    F.mse_loss: (half(4), half(4).flip(0)),
    F.multi_margin_loss: (half(4, 3), torch.tensor([0, 1, 2, 0])),
    F.multilabel_margin_loss: (half(4, 3), torch.tensor([[0, -1, -1]] * 4)),
    F.multilabel_soft_margin_loss: (half(4, 3), half(4, 3).round()),
    F.nll_loss: (half(4, 3).log(), torch.tensor([0, 1, 2, 0])),
    F.poisson_nll_loss: (half(4), half(4).flip(0)),
    F.smooth_l1_loss: (half(4), half(4).flip(0)),
    F.soft_margin_loss: (half(4), SIGNS.bfloat16()),
    F.triplet_margin_loss: (half(4, 3), half(4, 3).flip(0), half(4, 3).flip(1)),
    F.triplet_margin_with_distance_loss: (half(4, 3), half(4, 3).flip(0), half(4, 3).flip(1)),
}


def test_every_loss_is_tried_here() -> None:
    assert set(CALLS) == set(LOSSES)


@pytest.mark.filterwarnings("ignore:binary_cross_entropy was given probabilities")
@pytest.mark.parametrize("loss", CALLS, ids=lambda loss: loss.__name__)
def test_losses_of_half_tensors_are_the_fp32_ones(loss: Callable[..., Tensor]) -> None:
    arguments = CALLS[loss]
    with FP32Functions():
        ours = loss(*arguments)
    in_fp32 = [a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]
    assert ours.dtype == torch.float32
    assert torch.equal(ours, loss(*in_fp32))


def test_modules_and_keywords_too_and_gradients_come_back_half() -> None:
    logits = half(4, 3).requires_grad_()
    with FP32Functions():
        loss = torch.nn.CrossEntropyLoss(weight=half(3), label_smoothing=0.1)(logits, torch.tensor([0, 1, 2, 0]))
        keyword = F.mse_loss(input=logits, target=half(4, 3))
    assert loss.dtype == keyword.dtype == torch.float32
    (loss + keyword).backward()
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_comes_back_from_a_spectrum_goes_on_in_half(dtype: torch.dtype) -> None:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    with default_dtype(dtype), FP32Functions():
        spectrum = torch.fft.rfft(x.to(dtype))
        back = torch.fft.irfft(spectrum * 2, n=8)
    assert (spectrum.dtype, back.dtype) == (torch.complex64, dtype)
    torch.testing.assert_close(back, (2 * x.to(dtype).float()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_linear_algebra_on_complex_numbers_keeps_its_type() -> None:
    x = torch.randn(4, 4, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    with default_dtype(torch.bfloat16), FP32Functions():
        assert torch.linalg.svdvals(x).dtype == torch.float32


def assigned(x: Tensor, where: Tensor, number: float) -> Tensor:
    x[where] = number
    return x


MASK = torch.tensor([True, False])
FILLS: dict[str, tuple[Callable[[Tensor], Tensor], list[float]]] = {
    "masked_fill": (lambda x: x.masked_fill(MASK, -1e9), [-65504, 1]),
    "where": (lambda x: torch.where(MASK, x, -1e9), [1, -65504]),
    "method": (lambda x: x.where(MASK, -1e9), [1, -65504]),
    "numbers": (lambda x: torch.where(MASK, 0.0, -1e9), [0, -65504]),
    "pad": (lambda x: F.pad(x, (0, 1), value=-1e9), [1, 1, -65504]),
    "full": (lambda x: torch.full((2,), 1e9), [65504, 65504]),
    "infinite": (lambda x: torch.where(MASK, x, -torch.inf), [1, -torch.inf]),
    "setitem": (lambda x: assigned(x, MASK, -1e9), [-65504, 1]),
    "setitem, small": (lambda x: assigned(x, MASK, 1e-9), [2**-24, 1]),
    "scatter": (lambda x: x.scatter(0, torch.tensor([0]), -1e9), [-65504, 1]),
    "clip": (lambda x: x.clip(1e9, 2e9), [65504, 65504]),
    "threshold": (lambda x: F.threshold(x, 2.0, -1e9), [-65504, -65504]),
    "hardtanh": (lambda x: F.hardtanh(x, -1e9, 1e9), [1, 1]),
    "pad_sequence": (lambda x: pad_sequence([x[:0], x[:1]], padding_value=-1e9).view(-1), [-65504, 1]),
    "tensor": (lambda x: x.masked_fill(MASK, torch.tensor(-1e9, dtype=torch.float32)), [-65504, 1]),
    "tensor first": (lambda x: torch.where(MASK, torch.tensor(-1e9, dtype=torch.float32), x), [-65504, 1]),
    "small": (lambda x: x.masked_fill(MASK, -1e-8), [-(2**-24), 1]),
    "clamp": (lambda x: (0 * x).clamp_min(1e-12), [2**-24, 2**-24]),
    "plus": (lambda x: 0 * x + 1e-8, [2**-24, 2**-24]),
    "to a number": (lambda x: 1e-8 + 0 * x, [2**-24, 2**-24]),
    "function": (lambda x: torch.add(0 * x, 1e-8), [2**-24, 2**-24]),
    "in place": (lambda x: (0 * x).add_(-1e-8), [-(2**-24), -(2**-24)]),
    "no less": (lambda x: 0 * x + 1e-6, [17 * 2**-24, 17 * 2**-24]),
    "zero": (lambda x: 0 * x + 0.0, [0, 0]),
}


@pytest.mark.parametrize("fill", FILLS)
def test_a_number_beyond_half_becomes_the_nearest_in_it(fill: str) -> None:
    call, expected = FILLS[fill]
    with default_dtype(torch.float16), FP32Functions():
        assert call(torch.ones(2)).tolist() == expected
        assert call(torch.ones(2)).dtype == torch.float16


@pytest.mark.parametrize(
    "call",
    [
        lambda ids: torch.full((2,), 128000),
        lambda ids: torch.full_like(ids, 128000),
        lambda ids: ids.new_full((2,), 128000),
        lambda ids: ids.masked_fill(MASK, 128000).masked_fill(~MASK, 128000),
        lambda ids: torch.where(MASK, 128000, 128000),
        lambda ids: torch.where(ids == 0, 128000, ids),
        lambda ids: F.pad(ids[:0], (0, 2), value=128000),
    ],
)
def test_whole_numbers_stay_whole(call: Callable[[Tensor], Tensor]) -> None:
    """A vocabulary may have more tokens than fp16 has numbers."""
    with default_dtype(torch.float16), FP32Functions():
        ids = call(torch.zeros(2, dtype=torch.int64))
    assert ids.dtype == torch.int64
    assert ids.tolist() == [128000, 128000]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("eps", [(), (1e-12,)])
def test_a_row_of_zeros_has_a_direction_and_a_gradient(dtype: torch.dtype, eps: tuple[float, ...]) -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], dtype=dtype, requires_grad=True)
    with default_dtype(dtype), FP32Functions():
        direction = F.normalize(x, 2, -1, *eps)
        cosine = F.cosine_similarity(x, x.detach(), -1, *eps)
        normalized = F.normalize(input=x, dim=-1)
    (direction + cosine + normalized).sum().backward()
    assert direction.dtype == cosine.dtype == dtype
    torch.testing.assert_close(direction.float(), torch.tensor([[0.0, 0.0], [0.6, 0.8]]), atol=4e-3, rtol=0)
    torch.testing.assert_close(cosine.float(), torch.tensor([0.0, 1.0]), atol=4e-3, rtol=0)
    assert torch.equal(direction, normalized)
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_an_eps_that_half_holds_is_the_callers() -> None:
    x = torch.tensor([[3e-3, 4e-3]], dtype=torch.bfloat16)
    with FP32Functions():
        torch.testing.assert_close(F.normalize(x, eps=1.0).float(), x.float())


def test_half_probabilities_in_a_loss_are_warned_of_once() -> None:
    warn_of_probabilities.cache_clear()
    logits = half(4, 3)
    with FP32Functions(), warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        for _ in range(2):
            torch.nn.BCELoss()(logits.sigmoid(), torch.zeros(4, 3))
            F.binary_cross_entropy(logits.float().sigmoid(), torch.zeros(4, 3))
            F.binary_cross_entropy_with_logits(logits, torch.zeros(4, 3))
    assert len(given) == 1
    assert "use binary_cross_entropy_with_logits" in str(given[0].message)


def test_sums_of_all_are_fp32_and_those_of_each_are_half() -> None:
    x = half(4, 3)
    with FP32Functions():
        assert (x * x).sum().dtype == torch.float32
        assert torch.vmap(lambda row: (row * row).sum())(x).dtype == torch.bfloat16
        assert torch.func.grad(lambda rows: (rows * rows).sum())(x).dtype == torch.bfloat16


def test_nothing_else_is_touched() -> None:
    with FP32Functions():
        assert (half(3) @ half(3)).dtype == torch.bfloat16
        assert half(4, 3).softmax(1).dtype == torch.bfloat16
        assert F.layer_norm(half(4, 3), (3,)).dtype == torch.bfloat16
    assert F.mse_loss(half(3), half(3)).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_losses_within_a_compiled_function_are_fp32() -> None:
    @torch.compile
    def compiled(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x * 2, y)

    with FP32Functions():
        loss = compiled(half(4, 3), torch.tensor([0, 1, 2, 0]))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy((half(4, 3) * 2).float(), torch.tensor([0, 1, 2, 0])))
