"""The plugin and its kernels on a GPU: the same numbers as on a CPU, in one launch, without waiting for the device."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import FORMATS, OPTIONS, SIZES, fp32_of, slot_for
from torch import Tensor, nn
from training import Classifier, classification, fit, mlp

from lightning_mpt import PRESETS, MasterAdamW, MasterWeightPrecision
from lightning_mpt.cross_entropy import cross_entropy
from lightning_mpt.fp32_functions import FP32Functions
from lightning_mpt.kernels import Kernel, kernel_for
from lightning_mpt.kernels.reference import ReferenceKernel
from lightning_mpt.kernels.slots import GradientTransform, Slot
from lightning_mpt.storage import master_storage, moment_storage

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]
HALVES = (torch.bfloat16, torch.float16)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within, a call that makes the host wait for the device raises."""
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def steps_on(device: str, dtype: torch.dtype, masters: str, moments: str) -> list[Slot]:
    """Six steps on gradients of many magnitudes, the same on every device; also an address that is not aligned."""
    torch.manual_seed(0)
    weights = [torch.randn(size).to(dtype) for size in SIZES]
    weights.append(torch.randn(2100).to(dtype))
    kernel: Kernel = ReferenceKernel() if device == "cpu" else kernel_for(torch.device(device))
    weights = [*weights[:-1], weights[-1].to(device)[3:]]
    slots = [slot_for(weight.to(device), masters, True, moment_storage(moments)) for weight in weights]
    for step in range(6):
        scales = 10 ** torch.randn(len(slots))
        gradients = [
            (torch.randn(len(slot.weight)) * scale).to(dtype).to(device)
            for slot, scale in zip(slots, scales.tolist(), strict=True)
        ]
        slots = [slot._replace(step=torch.tensor(step + 1.0, device=device)) for slot in slots]
        transform = GradientTransform(torch.tensor(0.125, device=device), 0.5 if step % 2 else None)
        kernel.adamw_(slots, gradients, master_storage(masters), moment_storage(moments), transform, **OPTIONS)
    return slots


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(("masters", "moments"), FORMATS)
def test_the_kernel_is_the_reference_in_every_format(masters: str, moments: str, dtype: torch.dtype) -> None:
    for ours, theirs in zip(
        steps_on("cuda", dtype, masters, moments), steps_on("cpu", dtype, masters, moments), strict=True
    ):
        values = [[value.cpu() for value in fp32_of(slot, masters, moments)] for slot in (ours, theirs)]
        for one, other in zip(*values, strict=True):
            near = torch.isclose(one, other, rtol=1e-5, atol=1e-6)
            assert near.double().mean() >= 0.9 or not near.numel()
            torch.testing.assert_close(one, other, rtol=0.1, atol=0.01)


def model(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(300, 70), (4096, 33), (5,), (), (2048,)]
    return [
        nn.Parameter(torch.randn(shape, device="cuda", generator=generator, dtype=torch.float32).to(dtype))
        for shape in shapes
    ]


def set_gradients(params: list[nn.Parameter], step: int, bad: bool = False) -> None:
    generator = torch.Generator("cuda").manual_seed(100 + step)
    for parameter in params:
        parameter.grad = torch.randn(parameter.shape, device="cuda", generator=generator, dtype=torch.float32).to(
            parameter.dtype
        )
    if bad:
        params[1].grad[7, 7] = float("inf")  # type: ignore[index]


@pytest.mark.parametrize("preset", ["exact", "compact"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_no_step_waits_for_the_device(dtype: torch.dtype, preset: str) -> None:
    params = model(dtype)
    optimizer = MasterAdamW(params, lr=1e-2, **PRESETS[preset])
    scale = torch.full((), 1024.0, device="cuda")
    for step in range(6):
        set_gradients(params, step, bad=step == 4)
        before = [parameter.detach().clone() for parameter in params]
        torch.cuda.synchronize()
        with no_waiting() if step > 0 else torch.no_grad():  # the first compiles the kernels
            found_inf, norm = optimizer.scan_gradients(norm=True)
            assert norm is not None
            optimizer.grad_scale = scale * (norm / scale).clamp(min=1.0)
            optimizer.found_inf, optimizer.clip_value = found_inf, None
            optimizer.step()
        assert found_inf.item() == (step == 4)
        same = [torch.equal(parameter, old) for parameter, old in zip(params, before, strict=True)]
        assert all(same) if step == 4 else not any(same)


@pytest.mark.parametrize("preset", ["exact", "compact"])
def test_a_step_can_be_captured_in_a_cuda_graph(preset: str) -> None:
    captured, eager = model(torch.bfloat16), model(torch.bfloat16)
    ours, theirs = (MasterAdamW(params, lr=1e-2, **PRESETS[preset]) for params in (captured, eager))
    set_gradients(captured, 0)
    set_gradients(eager, 0)
    gradients = [parameter.grad for parameter in captured]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        ours.step()
    torch.cuda.current_stream().wait_stream(side)
    theirs.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ours.step()
    for step in range(1, 4):
        set_gradients(eager, step)
        for gradient, parameter in zip(gradients, eager, strict=True):
            gradient.copy_(parameter.grad)  # type: ignore[union-attr, arg-type]
        graph.replay()
        theirs.step()
    torch.testing.assert_close([p.detach() for p in captured], [p.detach() for p in eager], rtol=0, atol=0)


def test_forward_backward_and_step_can_be_captured_together() -> None:
    """Gradients then lie in the graph's own memory, where no step before it has seen them."""
    nets = [nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).to("cuda", torch.bfloat16) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours, theirs = (MasterAdamW(net.parameters(), lr=1e-2) for net in nets)
    generator = torch.Generator("cuda").manual_seed(0)
    batches = [
        torch.randn(16, 64, device="cuda", generator=generator, dtype=torch.float32).bfloat16() for _ in range(4)
    ]
    batch = batches[0].clone()

    def step(net: nn.Module, optimizer: MasterAdamW, x: Tensor) -> None:
        optimizer.zero_grad()
        net(x).float().square().mean().backward()
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(nets[0], ours, batch)
    torch.cuda.current_stream().wait_stream(side)
    step(nets[1], theirs, batches[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(nets[0], ours, batch)
    for later in batches[1:]:
        batch.copy_(later)
        graph.replay()
        step(nets[1], theirs, later)
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), rtol=0, atol=0)


def test_a_parameter_of_more_than_two_to_the_31_elements() -> None:
    count = 2**31 + 4099
    parameter = nn.Parameter(torch.ones(count, device="cuda", dtype=torch.bfloat16))
    parameter.grad = torch.full_like(parameter, 0.5)
    optimizer = MasterAdamW([parameter], lr=0.125, weight_decay=0.0, **PRESETS["compact"])
    found_inf, _ = optimizer.scan_gradients(norm=False)
    assert found_inf.item() == 0
    optimizer.step()
    for part in (slice(0, 5), slice(2**31 - 3, 2**31 + 3), slice(count - 5, count)):
        torch.testing.assert_close(parameter.detach()[part].float(), torch.full_like(parameter[part], 0.875).float())
    parameter.grad[-1] = float("nan")
    found_inf, _ = optimizer.scan_gradients(norm=False)
    assert found_inf.item() == 1


def test_layouts_that_are_not_contiguous() -> None:
    for make in (
        lambda: torch.randn(64, 50, device="cuda").t(),
        lambda: torch.randn(3, 5, 4, 2, device="cuda").to(memory_format=torch.channels_last),
        lambda: torch.randn(9, 20, device="cuda")[:, ::2],
    ):
        torch.manual_seed(0)
        value = make()
        parameter = nn.Parameter(value.bfloat16() if value.is_contiguous() else value.to(torch.bfloat16))
        other = nn.Parameter(parameter.detach().cpu().clone())
        gradient = torch.randn(parameter.shape)
        parameter.grad, other.grad = gradient.cuda().bfloat16(), gradient.bfloat16()
        for each in (parameter, other):
            MasterAdamW([each], lr=1e-2).step()
        torch.testing.assert_close(parameter.detach().cpu(), other.detach(), rtol=2**-7, atol=0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_a_trainer_learns_as_in_fp32(precision: Any, preset: str) -> None:
    fp32 = Classifier(mlp())
    ours = copy.deepcopy(fp32)
    fit(fp32, classification(60), accelerator="cuda", devices=1)
    scale = 1024.0 if preset == "minimal" and precision == "16-true" else "auto"
    plugin = MasterWeightPrecision(precision, loss_scale=scale, **PRESETS[preset])
    fit(ours, classification(60), plugin, accelerator="cuda", devices=1)
    assert plugin.skipped_steps <= 5
    assert sum(ours.losses[-10:]) == pytest.approx(sum(fp32.losses[-10:]), rel=0.1)


@pytest.mark.parametrize("classes", [1000, 50257, 50304])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cross_entropy_is_torchs_in_fp32(dtype: torch.dtype, classes: int) -> None:
    torch.manual_seed(0)
    logits = (4 * torch.randn(1100, classes, device="cuda")).to(dtype)
    target = torch.randint(classes, (1100,), device="cuda")
    target[::9] = -100
    results = []
    for ours in (True, False):
        x = logits.clone().requires_grad_()
        loss = cross_entropy(x, target, -100, "mean") if ours else F.cross_entropy(x.float(), target)
        (1000 * loss).backward()
        results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=0)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=2.0**-7, atol=1e-6)


def test_split_and_float32_masters_train_bit_for_bit_alike() -> None:
    results: list[list[Tensor]] = []
    for masters in ("split", "float32"):
        params = model(torch.bfloat16)
        optimizer = MasterAdamW(params, lr=1e-2, master_weights=masters)
        for step in range(200):
            set_gradients(params, step)
            optimizer.step()
        results.append(optimizer.master_params())
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_logits_that_are_brought_to_fp32_are_not_copied(dtype: torch.dtype) -> None:
    rows, classes = 2048, 9000
    head = nn.Linear(16, classes, bias=False, device="cuda", dtype=dtype)
    x = torch.randn(rows, 16, device="cuda").to(dtype)
    target = torch.randint(classes, (rows,), device="cuda")
    gradients, peaks = [], []
    for waits in (True, False):
        for _ in range(2):  # the first makes workspaces
            head.zero_grad()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with FP32Functions() if waits else nullcontext():
                F.cross_entropy(head(x).float().view(-1, classes), target).backward()
            peaks.append(torch.cuda.max_memory_allocated() - before)
        assert head.weight.grad is not None
        gradients.append(head.weight.grad.float())
    torch.testing.assert_close(*gradients, rtol=0.02, atol=0.02 * float(gradients[1].abs().max()))
    assert peaks[1] <= 1.1 * 2 * 2 * rows * classes
    assert peaks[3] >= 2 * peaks[1]
