"""Cross entropy of many half logits: the numbers of FP32, gradients too, with nothing in FP32 as large as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_mpt import cross_entropy as module
from lightning_mpt.fp32_functions import FP32Functions
from lightning_mpt.kernels import cross_entropy as reference
from lightning_mpt.kernels.cross_entropy import CrossEntropyKernel
from lightning_mpt.profiler import MemoryRecorder

HALVES = (torch.bfloat16, torch.float16)
ROWS, CLASSES = 130, 40
ULP = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
"""Both are computed in FP32, and may be rounded to either neighbour where that falls on a tie."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve few logits too, and in steps of three rows."""
    monkeypatch.setattr("lightning_mpt.upcast.SMALLEST", 1)
    monkeypatch.setattr("lightning_mpt.upcast.WIDEST", 0)
    monkeypatch.setitem(reference.LOGITS_AT_ONCE, "cpu", 3 * CLASSES + 1)


@pytest.fixture(params=["reference", "triton"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CrossEntropyKernel:
    """Either kernel, which serves from now on."""
    made: CrossEntropyKernel = reference.ReferenceCrossEntropy()
    if request.param == "triton":
        request.getfixturevalue("triton_kernel")
        from lightning_mpt.kernels.triton import TritonCrossEntropy

        made = TritonCrossEntropy()
    monkeypatch.setattr(module, "cross_entropy_kernel_for", lambda device: made)
    return made


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits that it was called with."""
    calls: list[Tensor] = []
    original = module.cross_entropy

    def counted(logits: Tensor, *args: Any) -> Tensor:
        calls.append(logits)
        return original(logits, *args)

    monkeypatch.setattr(module, "cross_entropy", counted)
    return calls


def logits_and_target(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = (8 * torch.randn(ROWS, CLASSES, generator=generator)).to(dtype)
    target = torch.randint(CLASSES, (ROWS,), generator=generator)
    target[::7] = -100
    return logits, target


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_losses_and_gradients_are_those_of_fp32(
    served: list[Tensor], dtype: torch.dtype, reduction: str, ignore_index: int
) -> None:
    logits, target = logits_and_target(dtype)
    target = target.masked_fill(target == -100, ignore_index)
    results = []
    for ours in (True, False):
        x = logits.clone().requires_grad_()
        if ours:
            with FP32Functions():
                loss = F.cross_entropy(x, target, ignore_index=ignore_index, reduction=reduction)
        else:
            loss = F.cross_entropy(x.float(), target, ignore_index=ignore_index, reduction=reduction)
        assert loss.dtype == torch.float32
        (loss * torch.linspace(0.5, 2, ROWS) if reduction == "none" else loss * 100).sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == dtype
        results.append((loss.detach(), x.grad))
    assert len(served) == 1
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=ULP[dtype], atol=1e-6)


def oracle(logits: Tensor, target: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """The losses and the gradient of their weighted sum, in float64."""
    x = logits.double().requires_grad_()
    losses = F.cross_entropy(x, target, reduction="none")
    (losses * factor.double()).sum().backward()
    assert x.grad is not None
    return losses.detach(), x.grad


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("classes", [1, 7, 4096, 4097, 9001])
@pytest.mark.parametrize("offset", [0, 3])
def test_a_kernel_is_the_oracle_wherever_rows_begin(
    kernel: CrossEntropyKernel, dtype: torch.dtype, classes: int, offset: int
) -> None:
    """Rows of odd lengths begin at odd addresses, and so does the first in the middle of a tensor."""
    torch.manual_seed(0)
    rows = 5
    logits = (8 * torch.randn(offset + rows * classes)).to(dtype)[offset:].view(rows, classes)
    target, factor = torch.randint(classes, (rows,)), torch.linspace(0.5, 2, rows)
    target[2] = -100
    losses, log_sums = kernel.row_losses(logits, target, -100)
    gradient = kernel.gradient(logits, target, log_sums, factor, -100)
    true_losses, true_gradient = oracle(logits, target, factor)
    assert losses.dtype == log_sums.dtype == torch.float32
    assert gradient.dtype == dtype
    torch.testing.assert_close(losses.double(), true_losses, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(gradient.double(), true_gradient, rtol=ULP[dtype], atol=1e-7)
    assert not gradient[2].any()


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_logits_that_are_not_finite_give_a_loss_that_is_not(kernel: CrossEntropyKernel, bad: float) -> None:
    logits, target = torch.zeros(3, 5000, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int64)
    logits[1, 4999] = bad
    losses, log_sums = kernel.row_losses(logits, target, -100)
    assert losses.isfinite().tolist() == [True, False, True]
    gradient = kernel.gradient(logits, target, log_sums, torch.ones(3), -100)
    assert gradient.isfinite().all(1).tolist() == [True, False, True]


def test_classes_that_cannot_be_have_no_share(kernel: CrossEntropyKernel) -> None:
    """Masked logits are -inf: here all of the first block and more."""
    logits = torch.zeros(1, 9000, dtype=torch.float16)
    logits[:, :8998] = -float("inf")
    target = torch.tensor([8999])
    losses, log_sums = kernel.row_losses(logits, target, -100)
    gradient = kernel.gradient(logits, target, log_sums, torch.ones(1), -100)
    assert losses.item() == pytest.approx(0.6931472)
    assert gradient[0, 8998:].tolist() == [0.5, -0.5]
    assert not gradient[0, :8998].any()


def as_transformers(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x.float().view(-1, CLASSES), target)


def as_a_module(x: Tensor, target: Tensor) -> Tensor:
    return torch.nn.CrossEntropyLoss()(x.view(2, -1, CLASSES).flatten(0, 1), target)


def by_name(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(input=x.to(torch.float32), target=target)


def part(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x.float()[1:], target[1:])


def shifted(x: Tensor, target: Tensor) -> Tensor:
    x, target = x.float().view(2, -1, CLASSES), target.view(2, -1)
    return F.cross_entropy(x[..., :-1, :].contiguous().view(-1, CLASSES), target[..., 1:].flatten())


@pytest.mark.parametrize(
    ("call", "widest"),
    [(call, 0) for call in (as_transformers, as_a_module, by_name, part, shifted)]
    # What is no vocabulary's is copied at once, and remembered.
    + [(call, CLASSES) for call in (as_transformers, as_a_module, by_name)],
)
def test_it_serves_however_logits_come(
    served: list[Tensor], call: Callable[[Tensor, Tensor], Tensor], widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_mpt.upcast.WIDEST", widest)
    logits, target = logits_and_target(torch.bfloat16)
    with FP32Functions():
        loss = call(logits.requires_grad_(), target)
    assert len(served) == 1
    expected = call(logits.float(), target)
    torch.testing.assert_close(loss, expected)
    gradients = [torch.autograd.grad(one, logits)[0] for one in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=ULP[torch.bfloat16], atol=1e-6)


def changed(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x.float().mul_(2), target)


def scaled(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x.float() / 2, target)


def smoothed(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x, target, label_smoothing=0.1)


def weighted(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x, target, weight=torch.linspace(0.5, 1, CLASSES))


def transposed(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x.float().view(2, -1, CLASSES).transpose(1, 2), target.view(2, -1))


def written_before(x: Tensor, target: Tensor) -> Tensor:
    fp32 = x.float()
    x.data.mul_(2)
    x.detach().mul_(0.5)  # the values that it had, but who would know
    return F.cross_entropy(fp32, target)


@pytest.mark.parametrize("widest", [0, CLASSES])
@pytest.mark.parametrize("call", [changed, scaled, smoothed, weighted, transposed, written_before])
def test_anything_else_is_torchs_own_in_fp32(
    served: list[Tensor], call: Callable[[Tensor, Tensor], Tensor], widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_mpt.upcast.WIDEST", widest)
    logits, target = logits_and_target(torch.bfloat16)
    with FP32Functions():
        loss = call(logits.clone().requires_grad_(), target)
    assert served == []
    assert torch.equal(loss, call(logits.float(), target))


def test_a_gradient_of_the_gradient_is_there_where_it_is_asked_for() -> None:
    logits, target = logits_and_target(torch.bfloat16)
    penalties = []
    for ours in (True, False):
        x = logits.clone().requires_grad_()
        if ours:
            with FP32Functions():
                loss = F.cross_entropy(x, target)
        else:
            loss = F.cross_entropy(x.float(), target)
        (gradient,) = torch.autograd.grad(loss * 1000, x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.float().square().sum(), x)
        penalties.append(second)
    assert penalties[0].abs().max() > 0
    torch.testing.assert_close(penalties[0], penalties[1], rtol=0.05, atol=0.05 * float(penalties[1].abs().max()))


@pytest.mark.usefixtures("kernel")
def test_gradients_of_many_losses_are_taken_at_once(served: list[Tensor]) -> None:
    """As `torch.autograd.functional.jacobian(vectorize=True)` does."""
    logits, target = logits_and_target(torch.bfloat16)
    x = logits.clone().requires_grad_()
    with FP32Functions():
        ours = F.cross_entropy(x, target, reduction="none")
    assert len(served) == 1
    theirs = F.cross_entropy(x.float(), target, reduction="none")
    gradients = [torch.autograd.grad(one[:3], x, torch.eye(3), is_grads_batched=True)[0] for one in (ours, theirs)]
    assert gradients[0].shape == (3, *logits.shape)
    torch.testing.assert_close(*gradients, rtol=ULP[torch.bfloat16], atol=0)


@pytest.mark.usefixtures("kernel")
def test_a_class_that_is_not_there_is_an_error_as_in_torch() -> None:
    logits, target = logits_and_target(torch.bfloat16)
    target[5] = CLASSES
    with FP32Functions(), pytest.raises((IndexError, RuntimeError), match=r"out of bounds|is no class"):
        F.cross_entropy(logits.requires_grad_(), target)


def test_nothing_in_fp32_is_as_large_as_the_logits() -> None:
    """The peak is the logits and their half gradient, and little else; torch's own takes four times as much more.

    Also where the caller brings the logits to FP32.
    """
    rows, classes = 512, 4096
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "half": lambda x: x,
        "float()": lambda x: x.float(),
        "torch's own": lambda x: x.float() * 1.0,
    }
    peaks = {}
    for name, call in calls.items():
        head = torch.nn.Linear(8, classes, bias=False).bfloat16()
        x, target = torch.randn(rows, 8).bfloat16(), torch.zeros(rows, dtype=torch.int64)
        recorder = MemoryRecorder(head, steps=1, warmup_steps=1)
        with recorder, FP32Functions():
            for _ in range(2):
                logits = call(head(x))
                loss = F.cross_entropy(logits, target)
                del logits
                loss.backward()
                del loss
                head.zero_grad()
                recorder.step()
        peaks[name] = recorder.report.peak_bytes
    assert peaks["half"] <= 1.2 * 2 * 2 * rows * classes
    assert peaks["float()"] <= 1.01 * peaks["half"]
    assert peaks["torch's own"] >= 2.2 * peaks["half"]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, where duals are first made
def test_derivatives_may_go_forward() -> None:
    logits, target = logits_and_target(torch.bfloat16)
    tangents = []
    for ours in (True, False):
        with torch.autograd.forward_ad.dual_level():
            x = torch.autograd.forward_ad.make_dual(logits.clone().requires_grad_(), torch.ones_like(logits))
            if ours:
                with FP32Functions():
                    loss = F.cross_entropy(x.square(), target)
            else:
                loss = F.cross_entropy(x.square().float(), target)
            tangents.append(torch.autograd.forward_ad.unpack_dual(loss).tangent)
    torch.testing.assert_close(*tangents)
