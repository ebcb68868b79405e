"""What CUDA does otherwise, put in the place of what a CPU does. No GPU has confirmed these rules."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.estimate import Case, gpt2
from benchmarks.recorded import Step
from lightning_mpt.cli.estimate import estimate
from lightning_mpt.profiler.estimate import Trial
from lightning_mpt.profiler.estimate.corrections import (
    AUTOCAST_FP32_RESULT,
    AUTOCAST_TO_FP32,
    CUBLAS_WORKSPACE_BYTES,
    cuda_kernels,
    cuda_optimizer,
    unknowns,
)

SHAPE = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 256, "seq_len": 128, "batch_size": 4}
SCORES = SHAPE["batch_size"] * SHAPE["seq_len"] ** 2
GPT2 = Case(gpt2, SHAPE)


@pytest.fixture
def cuda() -> Iterator[None]:
    with cuda_kernels(), FakeTensorMode():
        yield


def saved(run: Callable[[], Tensor]) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """What `run` saves for backward, once for every storage; and backward runs."""
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run().sum().backward()
    return [(tuple(tensor.shape), tensor.dtype) for tensor in kept.values()]


def test_dropout_keeps_a_mask_of_bytes(cuda: None) -> None:
    x = torch.empty(4, 8, dtype=torch.bfloat16, requires_grad=True)
    assert saved(lambda: F.dropout(x, 0.1)) == [((4, 8), torch.bool)]
    assert saved(lambda: F.dropout(x, 0.1, training=False)) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
def test_attention_keeps_no_scores(cuda: None, dtype: torch.dtype, masked: bool) -> None:
    q, k, v = (torch.empty(2, 4, 32, 64, dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 32, 32, dtype=torch.bool) if masked else None
    kept = saved(lambda: F.scaled_dot_product_attention(q, k, v, mask, is_causal=not masked, dropout_p=0.1))
    assert kept.count(((2, 4, 32, 64), dtype)) == 4  # q, k, v and the output
    assert ((2, 4, 32), torch.float32) in kept
    assert not any(shape == (2, 4, 32, 32) and kind is torch.float32 for shape, kind in kept) or masked


def test_attention_of_an_odd_width_keeps_scores_in_fp32_and_is_padded_in_half(cuda: None) -> None:
    q = torch.empty(2, 4, 32, 9, requires_grad=True)
    assert ((8, 32, 32), torch.float32) in [
        ((shape[0] * shape[1], *shape[2:]) if len(shape) == 4 else shape, kind)
        for shape, kind in saved(lambda: F.scaled_dot_product_attention(q, q, q))
    ]
    half = torch.empty(2, 4, 32, 9, dtype=torch.float16, requires_grad=True)
    kept = saved(lambda: F.scaled_dot_product_attention(half, half, half))
    assert ((2, 4, 32, 16), torch.float16) in kept
    assert half.grad is not None
    assert half.grad.shape == half.shape


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_softmax_into_fp32_copies_nothing(cuda: None, dtype: torch.dtype) -> None:
    x = torch.empty(4, 8, dtype=dtype, requires_grad=True)
    for function in (F.softmax, F.log_softmax):
        assert saved(lambda function=function: function(x, -1, dtype=torch.float32)) == [((4, 8), torch.float32)]
        assert function(x, -1).dtype == dtype
    assert x.grad is not None
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_gives_fp32_where_cudas_does(cuda: None, dtype: torch.dtype) -> None:
    x = torch.empty(4, 4, dtype=dtype, requires_grad=True)
    with torch.autocast("cpu", dtype):
        for give in (
            lambda: F.layer_norm(x, (4,)),
            lambda: F.group_norm(x, 2),
            lambda: F.softmax(x, -1),
            lambda: x.exp(),
            lambda: x.pow(2),
            lambda: x.sum(),
            lambda: x.sum(0),
            lambda: x.cumsum(0),
            lambda: F.cross_entropy(x, torch.zeros(4, dtype=torch.int64)),
            lambda: F.mse_loss(x, x),
        ):
            assert give().dtype == torch.float32
        assert x.sum(dtype=torch.float64).dtype == torch.float64
        assert F.softmax(x, -1, dtype=torch.float64).dtype == torch.float64
        assert (x @ x).dtype == F.gelu(x).dtype == dtype


def test_cross_entropy_under_autocast_keeps_its_log_softmax_in_half(cuda: None) -> None:
    """CUDA's autocast has no rule for it, and its log-softmax is told the logits' type (native/LossNLL.cpp)."""
    logits = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
    cast = loss.grad_fn.next_functions[0][0]
    assert loss.dtype == torch.float32
    assert cast.next_functions[0][0]._saved_result.dtype == torch.bfloat16


def test_afterwards_a_cpu_is_a_cpu() -> None:
    with cuda_kernels():
        pass
    x = torch.ones(4, 4, requires_grad=True)
    assert F.dropout(x, 0.5).grad_fn.name() == "MulBackward0"
    with torch.autocast("cpu", torch.bfloat16):
        assert F.layer_norm(x.bfloat16(), (4,)).dtype == torch.bfloat16
    names = {*AUTOCAST_TO_FP32, *AUTOCAST_FP32_RESULT}
    assert len(names) == len(AUTOCAST_TO_FP32) + len(AUTOCAST_FP32_RESULT)


def test_torchs_optimizers_update_many_tensors_at_once_unless_told() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    for options, foreach in (({}, True), ({"foreach": False}, False), ({"fused": True}, None)):
        optimizer = torch.optim.AdamW([parameter], **options)
        cuda_optimizer(optimizer)
        assert optimizer.param_groups[0]["foreach"] is foreach
    optimizer = torch.optim.LBFGS([parameter])
    cuda_optimizer(optimizer)
    assert "foreach" not in optimizer.param_groups[0]


def test_what_is_not_counted_is_said() -> None:
    notes = " ".join(unknowns(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.GRU(1, 1))))
    for word in ("fragmentation", "convolutions", "batch norm", "Recurrent", "cuBLAS"):
        assert word in notes
    assert "convolutions" not in " ".join(unknowns(nn.Linear(1, 1)))


def _gpt2(precision: str, device: str) -> dict[str, int]:
    batch = GPT2.make(**GPT2.shape)[1]
    report = estimate(Trial(lambda: Step(GPT2.make(**GPT2.shape)[0]), [batch]), precision, device=device)
    assert report.device == f"{device} (estimated)"
    assert sum(report.categories.values()) == report.peak_bytes
    step = report.phases["optimizer_step"].categories
    return {**report.categories, "in_step": step.get("temporaries", 0), "blocks": report.peak_bytes}


def test_gpt2_on_cuda_beside_gpt2_on_a_cpu() -> None:
    cuda, cpu = _gpt2("32-true", "cuda"), _gpt2("32-true", "cpu")
    assert cuda["blocks"] % 512 == 0
    assert cuda["rounding"] > 0 == cpu["rounding"]
    assert cuda["weights"] == cpu["weights"]
    # The root of the second moment, of all parameters at once.
    assert cuda["in_step"] >= CUBLAS_WORKSPACE_BYTES + cuda["weights"] > cpu["in_step"]
    # A byte for each element that dropout saw, and not four.
    assert cuda["activations"] < cpu["activations"]


@pytest.mark.parametrize("precision", ["mpt-16-true", "mpt-bf16-true:compact", "mpt-bf16-true:minimal"])
def test_our_kernel_needs_next_to_nothing_within_its_step(precision: str) -> None:
    sizes = _gpt2(precision, "cuda")
    assert sizes["in_step"] - CUBLAS_WORKSPACE_BYTES < 0.01 * sizes["weights"] + 4096
    if precision.endswith("minimal"):
        assert sizes["gradients"] < 0.5 * sizes["weights"]


def test_16_mixed_needs_what_bf16_mixed_needs() -> None:
    assert _gpt2("16-mixed", "cuda") == _gpt2("bf16-mixed", "cuda")
