"""A tensor that stands for an FP32 copy is that copy to whoever asks, values and gradients, and takes no memory."""

import copy
import ctypes
import io
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from halves import SHAPE, Step, half
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from training import TiedGPT2, fit

from lightning_mpt import MasterWeightPrecision
from lightning_mpt.fp32_functions import FP32Functions
from lightning_mpt.profiler import MemoryProfiler
from lightning_mpt.upcast import Casts, Upcast, half_values, upcast


def set_first(x: Tensor) -> None:
    x[0] = 3.0


STEPS: dict[str, Step] = {
    "view": lambda x: x.view(-1) if x.is_contiguous() else x,
    "reshape": lambda x: x.reshape(-1, 1),
    "flatten": lambda x: x.flatten(),
    "slice": lambda x: x[1:],
    "every other": lambda x: x[..., ::2],
    "transpose": lambda x: x.transpose(0, -1),
    "unsqueeze": lambda x: x.unsqueeze(0),
    "expand": lambda x: x.unsqueeze(0).expand(2, *x.shape),
    "split": lambda x: x.split(2)[0],
    "unbind": lambda x: x.unbind()[-1] if x.dim() > 1 and len(x) else x,
    "contiguous": lambda x: x.contiguous(),
    "clone": lambda x: x.clone(),
    "alias": lambda x: x.view_as(x),
    "mul": lambda x: x * 1.5,
    "softmax": lambda x: x.softmax(-1),
    "changed copy": lambda x: x.clone().mul_(2.0),
    "cat": lambda x: torch.cat([x, 2 * x]),
    "float": lambda x: x.float(),
    "half": lambda x: x.bfloat16().float(),
    "index": lambda x: x[x > 0],
    "as_strided": lambda x: x.as_strided((x.numel() and 2,), (0,), x.storage_offset()),
    "bits": lambda x: x.detach().view(torch.int32).float() * 1e-9 + x,
}


@settings(max_examples=300, deadline=None)
@given(
    names=st.lists(st.sampled_from(sorted(STEPS)), max_size=6),
    dtype=st.sampled_from([torch.bfloat16, torch.half]),
    start=st.integers(0, 2),
)
def test_whatever_is_done_to_it_comes_out_as_from_the_copy(names: list[str], dtype: torch.dtype, start: int) -> None:
    outcomes = []
    for cast in (upcast, Tensor.float):
        leaf = half(dtype=dtype)
        x = cast((leaf * 2)[start:])
        for name in names:
            x = STEPS[name](x)
        weights = torch.linspace(0.5, 2.0, x.numel()).view(x.shape)
        (x * weights).sum().backward()
        outcomes.append((x.detach() + 0, x.stride(), leaf.grad))
    (ours, our_strides, our_gradient), (theirs, their_strides, their_gradient) = outcomes
    assert torch.equal(ours, theirs)
    assert our_strides == their_strides
    assert torch.equal(our_gradient, their_gradient)  # type: ignore[arg-type]


def test_pairs_of_it_are_complex_numbers() -> None:
    """As Llama's rotary embeddings have it."""
    x, plain = upcast(half() * 2), (half() * 2).float()
    assert torch.equal(torch.view_as_complex(x.view(4, 3, 2)), torch.view_as_complex(plain.view(4, 3, 2)))


@pytest.mark.parametrize("change", [lambda x: x.mul_(2), set_first, lambda x: x.masked_fill_(x > 0, -1.0)])
@pytest.mark.parametrize("used", [False, True], ids=["first use", "used before"])
def test_a_write_is_seen_by_every_view(change: Callable[[Tensor], Any], used: bool) -> None:
    for write_to_view in (False, True):
        results = []
        for cast in (upcast, Tensor.float):
            x = cast(half() * 2)
            view, part = x.view(-1), x[1:]
            if used:
                view.sum()
                part.max()
            change(view if write_to_view else x)
            results.append((x + 0, view + 0, part + 0, x.view(-1) + 0))
            if cast is upcast:
                assert half_values(x) is half_values(view) is half_values(part) is None
        for ours, theirs in zip(*results, strict=True):
            assert torch.equal(ours, theirs)


def test_views_and_copies_of_it_take_no_fp32_memory() -> None:
    made: list[bool] = []
    x = upcast(half() * 2, made.append)
    for view in (x.view(-1), x[..., :-1, :].contiguous(), x.flatten().view(6, 4).t(), x.detach()):
        assert isinstance(view, Upcast)
        shown = half_values(view)
        assert shown is not None
        assert shown.dtype == torch.bfloat16
        assert shown.shape == view.shape
    assert torch.equal(x.argmax(-1), (half() * 2).argmax(-1))
    assert made == []
    x.sum()
    x.view(-1).sum()
    assert made == [False]


def test_values_changed_before_they_are_used_are_an_error() -> None:
    logits = half() * 2
    x = upcast(logits)
    y = upcast(logits)
    kept = y + 0
    logits.mul_(2)
    assert half_values(x) is half_values(y) is None
    assert torch.equal(y + 0, kept)
    with pytest.raises(RuntimeError, match=r"shape \(4, 6\) was brought to FP32, and then changed in place"):
        x + 1


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "mul_": lambda x: x.mul_(2),
    "*=": lambda x: operator.imul(x, 2),
    "[]=": set_first,
    "of a view": lambda x: x.view(-1)[3:].add_(1),
    "of data": lambda x: x.data.fill_(1),
    "out=": lambda x: torch.neg(torch.ones(SHAPE, dtype=x.dtype), out=x.detach()),
    "masked_fill_": lambda x: x.masked_fill_(x > 0, 0.0),
    "copy_": lambda x: x.copy_(torch.ones(SHAPE)),
    "dropout": lambda x: F.dropout(x, inplace=True),
    "relu_": lambda x: F.relu_(x),
    "list": lambda x: torch._foreach_mul_([x.detach()], 2),
    "operator": lambda x: torch.ops.aten.mul_.Tensor(x, 2),
}


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_within_the_mode_they_may_change_as_those_of_a_copy_may(write: Callable[[Tensor], Any]) -> None:
    logits = half() * 2
    expected = logits.float()
    with FP32Functions():
        x = logits.float()
        other = (half(1) * 2).float()
        write(logits)
        write(half(2) * 2)
    assert torch.equal(x, expected)
    assert half_values(other) is not None


def test_what_reads_memory_or_saves_gets_the_copy() -> None:
    logits = half() * 2
    x, plain = upcast(logits).detach(), logits.detach().float()
    assert x.tolist() == plain.tolist()
    assert (x.numpy() == plain.numpy()).all()
    assert x.data_ptr() == x.in_fp32().data_ptr() != 0  # type: ignore[attr-defined]
    assert torch.equal(torch.from_dlpack(x), plain)
    file = io.BytesIO()
    torch.save({"logits": x[1:]}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["logits"]
    assert type(loaded) is Tensor
    assert torch.equal(loaded, plain[1:])
    copied = copy.deepcopy(x)
    assert type(copied) is Tensor
    assert torch.equal(copied, plain)
    assert "Upcast" in repr(x)


class Exponential(torch.autograd.Function):
    """Written by a user."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.exp()


def compiled(x: Tensor) -> Tensor:
    result: Tensor = torch.compile(lambda y: (2 * y).softmax(-1)[0], backend="aot_eager")(x)
    return result


def recomputed(x: Tensor) -> Tensor:
    return checkpoint(lambda y: y.exp().log_softmax(-1), x, use_reentrant=False)


def saved_elsewhere(x: Tensor) -> Tensor:
    with torch.autograd.graph.save_on_cpu():
        return x.square()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
@pytest.mark.parametrize("function", [Exponential.apply, compiled, recomputed, saved_elsewhere])
def test_gradients_pass_through_what_others_wrote(function: Callable[[Tensor], Tensor]) -> None:
    gradients = []
    for cast in (upcast, Tensor.float):
        leaf = half()
        function(cast(leaf * 2)).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, where duals are first made
def test_second_and_forward_mode_derivatives() -> None:
    second, forward = [], []
    for cast in (upcast, Tensor.float):
        leaf = half()
        (gradient,) = torch.autograd.grad(cast(leaf * 2).exp().sum(), leaf, create_graph=True)
        second.append(torch.autograd.grad(gradient.float().square().sum(), leaf)[0])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(half().detach(), torch.ones(SHAPE, dtype=torch.bfloat16))
            forward.append(torch.autograd.forward_ad.unpack_dual(cast(dual * 2)).tangent)
    assert torch.equal(*second)
    assert torch.equal(*forward)


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_mpt.upcast.SMALLEST", 1)
    monkeypatch.setattr("lightning_mpt.upcast.WIDEST", 0)


CASTS: list[Step] = [
    lambda x: x.float(),
    lambda x: x.to(torch.float32),
    lambda x: x.to(dtype=torch.float32),
    lambda x: x.to("cpu", torch.float32, copy=True),
    lambda x: x.to(torch.zeros(())),
    lambda x: x.type(torch.float32),
]


@pytest.mark.usefixtures("_small")
@pytest.mark.parametrize("cast", CASTS)
def test_every_way_to_fp32_waits(cast: Step) -> None:
    with FP32Functions():
        x = cast(half() * 2)
    assert isinstance(x, Upcast)
    assert torch.equal(x + 0, half() * 2.0)


@pytest.mark.usefixtures("_small")
def test_other_casts_are_what_they_are() -> None:
    with FP32Functions():
        for cast in (Tensor.double, Tensor.half, lambda x: x.to(torch.bfloat16), lambda x: x.to("meta", torch.float32)):
            assert type(cast(half() * 2)) is Tensor
        assert (half() * 2).type() == "torch.BFloat16Tensor"
        assert type((half() * 2).t().float()) is Tensor  # not contiguous: its copy would be ordered alike
        with torch.no_grad():
            assert type((half() * 2).float()) is Tensor
        gradient = torch.func.grad(lambda x: x.float().square().sum())(half().detach())
    assert torch.equal(gradient, 2 * half().detach())


@pytest.mark.usefixtures("_small")
def test_subclasses_have_their_own_ways() -> None:
    class Own(Tensor):
        pass

    assert not isinstance(Casts().to_fp32((half() * 2).as_subclass(Own)), Upcast)


@pytest.mark.usefixtures("_small")
def test_what_is_needed_in_fp32_waits_once_and_logits_always() -> None:
    """A norm of one's own brings its input to FP32; logits may be looked at before the loss is taken."""
    casts = Casts()
    for step in range(3):
        with FP32Functions(casts):
            hidden = (half() * 2).float()
            normed = hidden * hidden.square().mean(-1, keepdim=True).rsqrt()
            logits = (half() @ torch.ones(6, 9, dtype=torch.bfloat16)).float()
            logits.amax(-1)
            F.cross_entropy(logits, torch.zeros(4, dtype=torch.int64))
        assert isinstance(hidden, Upcast) == (step == 0)
        assert isinstance(logits, Upcast)
        assert half_values(logits) is not None
        assert type(normed) is Tensor


def test_a_network_of_transformers_trains_with_no_logits_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peak is less by what the FP32 copy takes beyond the half gradient; its losses are the same."""
    tokens = torch.randint(9000, (8, 64), generator=torch.Generator().manual_seed(0))
    logits = 8 * 64 * 9000
    runs = {}
    for waits in (True, False):
        module = TiedGPT2(n_layer=1, n_embd=32, vocab_size=9000, n_positions=64)
        profiler = MemoryProfiler(tmp_path / str(waits), warmup_steps=1, steps=2)
        if not waits:
            monkeypatch.setattr(Casts, "cast", lambda self, func, args, kwargs: func(*args, **kwargs))
        fit(module, [(tokens,)] * 4, MasterWeightPrecision("bf16-true"), profiler=profiler)
        assert profiler.report is not None
        runs[waits] = (module.losses, profiler.report.peak_bytes)
    assert runs[False][1] - runs[True][1] >= 2 * logits
    assert runs[True][0] == pytest.approx(runs[False][0], rel=2e-3)


@pytest.mark.usefixtures("_small")
def test_images_may_change_their_memory_format() -> None:
    with FP32Functions():
        x = torch.randn(2, 3, 4, 4).bfloat16().requires_grad_() * 2
        assert x.to(memory_format=torch.channels_last).is_contiguous(memory_format=torch.channels_last)
        assert x.float(memory_format=torch.channels_last).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("_small")
def test_weights_in_fp32_may_be_kept_over_a_step() -> None:
    """As what they started from, that they are to stay near."""
    weight = torch.nn.Parameter(torch.ones(SHAPE, dtype=torch.bfloat16))
    with FP32Functions():
        kept = [weight.float().detach(), weight.view(-1).float().detach()]
    with torch.no_grad():
        weight.fill_(2.0)
    assert all(x.eq(1.0).all() for x in kept)


BEHIND: dict[str, Callable[[Tensor], Any]] = {
    "as_strided": lambda x: x.as_strided((3,), (1,)).zero_(),
    "bits": lambda x: x.view(torch.int32).zero_(),
    "numpy": lambda x: x.numpy().fill(0),
    "dlpack": lambda x: torch.from_dlpack(x).zero_(),
    "address": lambda x: ctypes.memset(x.data_ptr(), 0, x.nbytes),
    "list": lambda x: torch._foreach_zero_([x]),
}


@pytest.mark.parametrize("write", BEHIND.values(), ids=BEHIND)
def test_a_write_where_it_is_hard_to_see_leaves_no_half_values(write: Callable[[Tensor], Any]) -> None:
    x = upcast(half() * 2)
    write(x.detach())
    assert half_values(x) is None
    assert not x.view(-1)[:3].any()


def test_what_is_reduced_over_processes_is_no_longer_the_half_values(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = upcast(half() * 2)
        torch.distributed.all_reduce(x.detach())
    finally:
        torch.distributed.destroy_process_group()
    assert half_values(x) is None


def writes_to_no_memory() -> None:
    torch.eye(4).to_sparse().mul_(2)
    torch.vmap(lambda x: (x * 2).add_(1))(torch.ones(SHAPE))
    torch.func.grad(lambda x: x.square().sum())(torch.ones(SHAPE))


@pytest.mark.usefixtures("_small")
def test_other_tensors_may_have_no_memory_while_a_copy_waits() -> None:
    with FP32Functions():
        x = (half() * 2).float()
        writes_to_no_memory()
    assert half_values(x) is not None


def test_in_inference_mode_it_is_what_it_is() -> None:
    """As in validation, of what training kept."""
    x, plain = upcast(half() * 2).detach(), (half() * 2).detach().float()
    with torch.inference_mode():
        for step in (Tensor.clone, lambda x: x[:, 1:].contiguous(), lambda x: x.t().reshape(-1), lambda x: x[1:]):
            assert torch.equal(step(x), step(plain))
    assert torch.equal(x + 0, plain)


def test_a_gradient_that_waits_has_a_gradient() -> None:
    results = []
    for cast in (upcast, Tensor.float):
        leaf = half()
        x = cast(leaf * 2)
        x.register_hook(lambda gradient, cast=cast: cast(gradient.square().bfloat16()))
        (gradient,) = torch.autograd.grad(x.square().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(gradient.float().sum(), leaf)[0])
    assert torch.equal(*results)
