"""The update, in plain torch and in Triton, against a float64 oracle, which is first held against torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_cases import EXACT, decoded, slot_for
from oracle import OracleAdamW, norm
from torch import Tensor

from lightning_mpt import pieces
from lightning_mpt.kernels import Kernel
from lightning_mpt.kernels.slots import GradientTransform
from lightning_mpt.storage import (
    master_storage,
)

pytestmark = [
    # Numpy, which the interpreter computes with, warns of what a GPU does in silence: lanes past a tensor's end.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]

STEPS = 20
TOLERANCE = 5e-6
"""Weights are below 4, where FP32's last place is 2.4e-7, rounded once a step. Worst seen 2.8e-6 after 20 steps."""

RULES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adam": {"decoupled": False, "weight_decay": 0.1},
    "amsgrad": {"amsgrad": True, "betas": (0.5, 0.6)},
    "maximize": {"maximize": True},
    "strong decay": {"lr": 0.1, "weight_decay": 0.5, "eps": 1e-3},
}
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "one": lambda: torch.randn(1),
    "none": lambda: torch.randn(0),
    "scalar": lambda: torch.randn(()),
    "17x23": lambda: torch.randn(17, 23),
    "piece": lambda: torch.randn(64),
    "piece - 1": lambda: torch.randn(63),
    "piece + 1": lambda: torch.randn(65),
    "channels last": lambda: torch.randn(3, 5, 4, 2).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(7, 11).t(),
    "strided": lambda: torch.randn(9, 20)[:, ::2],
    "offset": lambda: torch.randn(40)[8:],
}


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 64 elements, so that every shape here meets their edges."""
    monkeypatch.setitem(pieces.LARGEST_PIECE, "cpu", 64)


def gradients(shape: torch.Size) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * 10.0 ** (i % 4 - 2) for i in range(STEPS)]


def run(
    kernel: Kernel,
    weight: Tensor,
    *,
    storage_name: str = "split",
    transform: GradientTransform | None = None,
    scale: float = 1.0,
    coefficient: float = 1.0,
    **rule: Any,
) -> tuple[Tensor, OracleAdamW]:
    """STEPS steps by the reference and by the oracle, from the same weight on the same (rounded) gradients."""
    oracle = OracleAdamW(weight, **rule)
    slot = slot_for(weight, storage_name, rule.get("amsgrad", False))
    transform = transform or GradientTransform(coefficient / scale)
    options: dict[str, Any] = {
        "lr": oracle.lr, "betas": oracle.betas, "eps": oracle.eps, "weight_decay": oracle.weight_decay,
        "decoupled": oracle.decoupled, "maximize": oracle.maximize,
    }  # fmt: skip
    for gradient in gradients(weight.shape):
        gradient = (gradient * scale).to(weight.dtype)
        slot.step.add_(1)
        kernel.adamw_([slot], [gradient], master_storage(storage_name), EXACT, transform, **options)
        oracle.step(gradient, scale=scale, coefficient=coefficient, clip_value=transform.clip_value)
    return decoded(slot, storage_name), oracle


@pytest.mark.parametrize("rule", RULES)
def test_the_oracle_is_torchs_adamw_in_float64(rule: str) -> None:
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(17, dtype=torch.float64))
    oracle = OracleAdamW(weight, **RULES[rule])
    options = dict(RULES[rule])
    kind = torch.optim.AdamW if options.pop("decoupled", True) else torch.optim.Adam
    theirs = kind([weight], **{"weight_decay": 1e-2, **options})
    for gradient in gradients(weight.shape):
        weight.grad = gradient.double()
        theirs.step()
        oracle.step(gradient)
    torch.testing.assert_close(weight.detach(), oracle.weight, rtol=1e-12, atol=1e-14)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("storage_name", ["split", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_in_every_type_is_the_oracles(
    kernel: Kernel, rule: str, dtype: torch.dtype, storage_name: str
) -> None:
    torch.manual_seed(0)
    master, oracle = run(kernel, torch.randn(100).to(dtype), storage_name=storage_name, **RULES[rule])
    torch.testing.assert_close(master.double(), oracle.weight, rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_shape_and_layout_is_the_oracles(kernel: Kernel, layout: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    pattern = LAYOUTS[layout]()
    weight = torch.empty_strided(
        pattern.shape, pattern.stride(), dtype=dtype
    ) if layout != "strided" else torch.zeros(9, 20, dtype=dtype)[:, ::2]  # fmt: skip
    weight.copy_(pattern)
    master, oracle = run(kernel, weight)
    torch.testing.assert_close(master.double(), oracle.weight, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(weight.float(), oracle.weight.float(), rtol=2**-8, atol=0)  # its rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("scale", "coefficient", "clip_value"),
    [(1024.0, 1.0, None), (1000.0, 1.0, None), (1.0, 0.3, None), (64.0, 0.01, None), (64.0, 1.0, 0.05)],
    ids=["scale", "no power of two", "coefficient", "both", "value"],
)
def test_gradients_are_unscaled_and_clipped_in_fp32(
    kernel: Kernel, dtype: torch.dtype, scale: float, coefficient: float, clip_value: float | None
) -> None:
    torch.manual_seed(0)
    transform = GradientTransform(coefficient / scale, clip_value)
    weight = torch.randn(100).to(dtype)
    master, oracle = run(kernel, weight, transform=transform, scale=scale, coefficient=coefficient)
    torch.testing.assert_close(master.double(), oracle.weight, rtol=0, atol=TOLERANCE)


def test_a_small_fp16_gradient_is_not_lost_when_it_is_unscaled(kernel: Kernel) -> None:
    """2**-24 over a scale of 2**10 is far below what fp16 holds, and moves the master like any other."""
    weight = torch.zeros(1, dtype=torch.float16)
    slot, gradient = slot_for(weight, "split", False), torch.full((1,), 2.0**-24, dtype=torch.float16)
    slot.step.add_(1)
    kernel.adamw_([slot], [gradient], master_storage("split"), EXACT, GradientTransform(2.0**-10), lr=1e-3,
                  betas=(0.9, 0.999), eps=0.0, weight_decay=0.0, decoupled=True, maximize=False)  # fmt: skip
    assert decoded(slot, "split").item() == pytest.approx(-1e-3, rel=1e-5)


@pytest.mark.parametrize("storage_name", ["split", "split8"])
def test_a_zero_that_was_written_into_a_weight_stays_a_number(kernel: Kernel, storage_name: str) -> None:
    """Its old correction may be negative, and the bits below those of 0 are a NaN's."""
    torch.manual_seed(0)
    weight = torch.randn(300).bfloat16()
    slot = slot_for(weight, storage_name, False)
    for zeroed in (False, True):
        if zeroed:
            weight[::3] = 0.0
            weight[1::3] = -0.0
        slot.step.add_(1)
        gradient = torch.randn(300).bfloat16()
        kernel.adamw_([slot], [gradient], master_storage(storage_name), EXACT, GradientTransform(), lr=1e-2,
                      betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, decoupled=True, maximize=False)  # fmt: skip
    found = decoded(slot, storage_name)
    assert found.isfinite().all()
    assert found[::3].abs().max() <= 0.02


def test_many_parameters_at_once_are_as_one_by_one(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    """However they are packed: large ones in pieces, small ones together, of several types."""
    results = []
    for length, together in ((2**12, True), (2**12, False), (100, True)):
        monkeypatch.setitem(pieces.LARGEST_PIECE, "cpu", length)
        torch.manual_seed(0)
        slots = []
        for i, size in enumerate([1, 5, 300, 7, 64, 0, 2000, 33, 33, 5000, 2]):
            weight = torch.randn(size).to((torch.bfloat16, torch.float32, torch.float16)[i % 3])
            slot = slot_for(weight, "split", False)
            slot.step.fill_(i % 4 + 1)
            slots.append((slot, torch.randn(size).to(weight.dtype)))
        for pack in [slots] if together else [[slot] for slot in slots]:
            kernel.adamw_(*zip(*pack, strict=True), master_storage("split"), EXACT, GradientTransform(0.5), lr=1e-2,
                          betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, decoupled=True, maximize=False)  # fmt: skip
        results.append([decoded(slot, "split") for slot, _ in slots])
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=3e-7, atol=1e-9)  # vector and scalar code round apart


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", [0, 99, 299])
def test_found_inf_sees_one_bad_element_anywhere(kernel: Kernel, dtype: torch.dtype, bad: float, where: int) -> None:
    tensors = [torch.ones(100, dtype=dtype) for _ in range(3)]
    assert kernel.scan_gradients(tensors, norm=False) == (torch.tensor(0.0), None)
    tensors[where // 100][where % 100] = bad
    found_inf, none = kernel.scan_gradients(tensors, norm=False)
    assert found_inf.item() == 1.0
    assert none is None


def test_large_finite_gradients_are_not_called_infinite(kernel: Kernel) -> None:
    """The squares of these overflow FP32; they do not."""
    for dtype, value in ((torch.bfloat16, 3e38), (torch.float32, 1e30), (torch.float16, 65504.0)):
        found_inf, _ = kernel.scan_gradients([torch.full((1000,), value, dtype=dtype)], norm=True)
        assert found_inf.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_norm_is_taken_over_all_elements_in_fp32(
    kernel: Kernel, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(pieces.LARGEST_PIECE, "cpu", 64)
    torch.manual_seed(0)
    tensors = [torch.randn(shape).to(dtype) for shape in [(100,), (3, 50), (), (0,)]] + [
        torch.randn(8, 8).to(dtype).t()
    ]
    _, value = kernel.scan_gradients(tensors, norm=True)
    assert value is not None
    assert value.item() == pytest.approx(norm(tensors), rel=1e-6)
