"""The update, in plain torch and in Triton, against a float64 oracle, which is first held against torch."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from oracle import OracleAdamW, norm
from torch import Tensor

from lightning_mpt import pieces
from lightning_mpt.kernels import Kernel
from lightning_mpt.kernels.reference import ReferenceKernel
from lightning_mpt.kernels.slots import GradientTransform, Slot
from lightning_mpt.state import decoded as decoded_moment
from lightning_mpt.storage import (
    HALF_DTYPES,
    MASTER_STORAGES,
    MOMENT_STORAGES,
    MomentStorage,
    master_storage,
    moment_storage,
    zeros,
)

pytestmark = [
    # Numpy, which the interpreter computes with, warns of what a GPU does in silence: lanes past a tensor's end.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
]

STEPS = 20
EXACT = moment_storage("float32")
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
def triton_kernel() -> Kernel:
    """Triton's kernel on CPU tensors, interpreted (see conftest.py)."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    if torch.cuda.is_available():
        pytest.skip("on a machine with a GPU the kernels are compiled for it, and tested there in test_cuda.py")
    from lightning_mpt.kernels.triton import TritonKernel

    return TritonKernel()


@pytest.fixture(params=["reference", "triton"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """Either kernel."""
    made: Kernel = ReferenceKernel() if request.param == "reference" else request.getfixturevalue("triton_kernel")
    return made


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of 64 elements, so that every shape here meets their edges."""
    monkeypatch.setitem(pieces.LARGEST_PIECE, "cpu", 64)


def gradients(shape: torch.Size, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10.0 ** (i % 4 - 2) for i in range(STEPS)]


def slot_for(weight: Tensor, storage_name: str, amsgrad: bool, moment_storage: MomentStorage = EXACT) -> Slot:
    lies_like = pieces.dense(weight)
    moments = [zeros(moment_storage, lies_like, signed=index == 0) for index in range(3)]
    half = weight.dtype in HALF_DTYPES
    return Slot(
        weight=weight,
        master=master_storage(storage_name).of_half(lies_like) if half else None,
        exp_avg=moments[0],
        exp_avg_sq=moments[1],
        max_exp_avg_sq=moments[2] if amsgrad else None,
        step=torch.zeros(()),
    )


def decoded(slot: Slot, storage_name: str) -> Tensor:
    if slot.master is None:
        return slot.weight.clone()
    weight = pieces.dense(slot.weight)
    out, spare = torch.empty(2, weight.numel())
    flat = master_storage(storage_name).decode(pieces.flat(weight), pieces.flat(slot.master), out, spare)
    return flat.clone().as_strided(weight.shape, weight.stride())


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


# -- every format -----------------------------------------------------------------------------------------------------

FORMATS = [(masters, moments) for masters in MASTER_STORAGES for moments in MOMENT_STORAGES]
LOSSY = [(masters, moments) for masters, moments in FORMATS if (masters, moments) not in
         {("float32", "float32"), ("split", "float32")}]  # fmt: skip
OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, "decoupled": True, "maximize": False,
}  # fmt: skip
SIZES = [1, 127, 128, 129, 0, 300, 2048, 2049, 5000]
"""About the edges of a block of scales and of the Triton kernel's tiles."""


SAME_CODES = 0.9
"""The share of codes that must be the same; with another dither, half of them would be. 0.93 seen, in split8."""


def fp32_of(slot: Slot, masters: str, moments: str) -> list[Tensor]:
    """Master and moments of a flat slot, decoded."""
    storage = moment_storage(moments)
    decoded_moments = [
        decoded_moment(stored, name, storage)
        for stored, name in zip(slot.moments, ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), strict=False)
    ]
    return [decoded(slot, masters), *decoded_moments]


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
