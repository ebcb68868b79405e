"""The update in every storage format: Triton's codes are the reference's, and both go where the oracle goes."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from kernel_cases import EXACT, FORMATS, OPTIONS, SIZES, decoded, fp32_of, slot_for
from oracle import OracleAdamW
from torch import Tensor

from lightning_mpt.kernels import Kernel
from lightning_mpt.kernels.reference import ReferenceKernel
from lightning_mpt.kernels.slots import GradientTransform, Slot
from lightning_mpt.state import decoded as decoded_moment
from lightning_mpt.storage import (
    MOMENT_STORAGES,
    master_storage,
    moment_storage,
)

pytestmark = [
    # Numpy, which the interpreter computes with, warns of what a GPU does in silence: lanes past a tensor's end.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]

LOSSY = [(masters, moments) for masters, moments in FORMATS if (masters, moments) not in
         {("float32", "float32"), ("split", "float32")}]  # fmt: skip
SAME_CODES = 0.9
"""The share of codes that must be the same; with another dither, half of them would be. 0.93 seen, in split8."""


def steps_with(
    kernel: Kernel, weights: Sequence[Tensor], masters: str, moments: str, *, steps: int = 6, amsgrad: bool = False
) -> list[Slot]:
    """Some steps of a kernel over clones of the weights, on gradients of many magnitudes."""
    generator = torch.Generator().manual_seed(0)
    slots = [slot_for(weight.clone(), masters, amsgrad, moment_storage(moments)) for weight in weights]
    for step in range(steps):
        scales = 10 ** torch.randn(len(weights), generator=generator)
        gradients = [
            (torch.randn(len(weight), generator=generator) * scale).to(weight.dtype)
            for weight, scale in zip(weights, scales.tolist(), strict=True)
        ]
        for slot in slots:
            slot.step.add_(1)
        transform = GradientTransform(0.125, 0.5 if step % 2 else None)
        kernel.adamw_(slots, gradients, master_storage(masters), moment_storage(moments), transform, **OPTIONS)
    return slots


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("masters", "moments"), FORMATS)
def test_triton_is_the_reference_in_every_format(
    triton_kernel: Kernel, masters: str, moments: str, dtype: torch.dtype
) -> None:
    """The same codes, dither and all, but where a rounding of FP32 falls on the other side of a threshold."""
    torch.manual_seed(0)
    weights = [torch.randn(size).to(dtype) for size in SIZES]
    weights.append(torch.randn(2100).to(dtype)[3:])  # not on a multiple of 16 bytes
    results = [
        [fp32_of(slot, masters, moments) for slot in steps_with(kernel, weights, masters, moments, amsgrad=True)]
        for kernel in (ReferenceKernel(), triton_kernel)
    ]
    for ours, theirs in zip(*results, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            near = torch.isclose(one, other, rtol=2e-6, atol=1e-6)
            assert near.double().mean() >= SAME_CODES or not near.numel()
            torch.testing.assert_close(one, other, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("masters", "moments"), LOSSY)
def test_lossy_formats_go_where_the_oracle_goes(kernel: Kernel, masters: str, moments: str, dtype: torch.dtype) -> None:
    """50 steps of one direction with noise: within a tenth of the way for each weight, 1 % on average over them."""
    torch.manual_seed(0)
    weight = torch.randn(512).to(dtype)
    start = weight.double()
    slot, oracle = slot_for(weight, masters, False, moment_storage(moments)), OracleAdamW(weight)
    direction = torch.randn(512)
    for _ in range(50):
        gradient = (direction + 0.3 * torch.randn(512)).to(dtype)
        slot.step.add_(1)
        options = {**OPTIONS, "lr": oracle.lr, "betas": oracle.betas, "weight_decay": oracle.weight_decay}
        kernel.adamw_(
            [slot], [gradient], master_storage(masters), moment_storage(moments), GradientTransform(), **options
        )
        oracle.step(gradient)
    gone = (oracle.weight - start).abs()
    error = decoded(slot, masters).double() - oracle.weight
    assert (error.abs() / gone).median() <= 0.1
    assert error.mean().abs() <= 0.01 * gone.mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("masters", "moments"), FORMATS)
def test_found_inf_changes_nothing_bit_for_bit(kernel: Kernel, masters: str, moments: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    (slot,) = steps_with(kernel, [torch.randn(300).to(dtype)], masters, moments)
    tensors = [slot.weight, slot.master, *(tensor for moment in slot.moments for tensor in moment)]
    before = [None if tensor is None else tensor.clone() for tensor in tensors]
    bad = torch.full((300,), float("nan"), dtype=dtype)
    kernel.adamw_(
        [slot], [bad], master_storage(masters), moment_storage(moments), GradientTransform(), **OPTIONS,
        found_inf=torch.tensor(1.0),
    )  # fmt: skip
    for tensor, old in zip(tensors, before, strict=True):
        assert tensor is old is None or torch.equal(tensor, old)  # type: ignore[arg-type]


@pytest.mark.parametrize(("masters", "moments"), FORMATS)
def test_what_is_found_of_each_parameter_holds_for_it_alone(triton_kernel: Kernel, masters: str, moments: str) -> None:
    """With weights of two dtypes, and one that has no elements."""
    torch.manual_seed(0)
    dtypes = (torch.bfloat16, torch.float32, torch.bfloat16, torch.bfloat16)
    weights = [torch.randn(size).to(dtype) for size, dtype in zip((300, 20, 0, 2049), dtypes, strict=True)]
    slots = [slot_for(weight, masters, False, moment_storage(moments)) for weight in weights]
    gradients = [torch.randn(len(weight)).to(weight.dtype) for weight in weights]
    gradients[3][2048] = float("nan")
    found_inf = triton_kernel.scan_each(gradients)
    assert found_inf.tolist() == ReferenceKernel().scan_each(gradients).tolist() == [0.0, 0.0, 0.0, 1.0]
    before = [weight.clone() for weight in weights]
    for slot in slots:
        slot.step.add_(1)
    triton_kernel.adamw_(
        slots, gradients, master_storage(masters), moment_storage(moments), GradientTransform(), **OPTIONS,
        found_inf=found_inf,
    )  # fmt: skip
    changed = [not torch.equal(old, new) for old, new in zip(before, weights, strict=True)]
    assert changed == [True, True, False, False]


@pytest.mark.parametrize("moments", MOMENT_STORAGES)
def test_second_moments_fall_when_gradients_do(kernel: Kernel, moments: str) -> None:
    """By a five-hundredth a step, less than codes are apart: rounded to nearest, many would stand still."""
    torch.manual_seed(0)
    slot = slot_for(torch.zeros(512), "split", False, moment_storage(moments))
    options = {**OPTIONS, "betas": (0.9, 0.998), "lr": 0.0}
    exact, now_small = torch.zeros(512), torch.rand(512) < 0.5
    for step in range(250):
        gradient = torch.randn(512) * torch.where(now_small & torch.tensor(step >= 50), 0.01, 1.0)
        exact = 0.998 * exact + 0.002 * gradient**2
        slot.step.add_(1)
        kernel.adamw_(
            [slot], [gradient], master_storage("split"), moment_storage(moments), GradientTransform(), **options
        )
    ratio = decoded_moment(slot.exp_avg_sq, "exp_avg_sq", moment_storage(moments)) / exact
    assert ratio[now_small].mean().item() == pytest.approx(1, abs=0.02)
    assert ratio[~now_small].mean().item() == pytest.approx(1, abs=0.02)


def test_split_masters_are_float32_ones_bit_for_bit(kernel: Kernel) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(size).bfloat16() for size in (100, 2048)]
    split, plain = (steps_with(kernel, weights, masters, "float32", steps=20) for masters in ("split", "float32"))
    for one, other in zip(split, plain, strict=True):
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(decoded(one, "split"), decoded(other, "float32"))


def test_one_launch_updates_all_parameters_of_a_type(triton_kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_mpt.kernels.triton import launch

    launches = []

    class Counted:
        def __getitem__(self, grid: Any) -> Any:
            launches.append(grid)
            return adamw_kernel[grid]

    adamw_kernel = launch.adamw_kernel
    monkeypatch.setattr(launch, "adamw_kernel", Counted())
    weights = [torch.ones(size).bfloat16() for size in SIZES * 5] + [torch.ones(7)]
    steps_with(triton_kernel, weights, "split", "float32", steps=1)
    tiles = sum(-(-len(weight) // launch.BLOCK) for weight in weights[:-1])
    assert sorted(launches) == [(1,), (tiles,)]  # one for bfloat16, one for float32


def test_rate_and_multiplier_may_be_tensors(kernel: Kernel) -> None:
    torch.manual_seed(0)
    weight, gradient = torch.randn(300).bfloat16(), torch.randn(300).bfloat16()
    results = []
    for make in (float, torch.tensor):
        slot = slot_for(weight.clone(), "split", False)
        slot.step.add_(1)
        transform = GradientTransform(make(0.25))
        options = {**OPTIONS, "lr": make(1e-2)}
        kernel.adamw_([slot], [gradient], master_storage("split"), EXACT, transform, **options)
        results.append(decoded(slot, "split"))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)
