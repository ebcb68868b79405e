"""How masters are stored: what is exact is exact bit for bit, and what is rounded is the nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_mpt.storage import MASTER_STORAGES, MasterStorage, master_storage, moment_storage
from lightning_mpt.storage.dither import offset, ramp

HALVES = (torch.bfloat16, torch.float16)
SMALLEST_EXACT = 2.0**-16
FP16_MAX = 65504.0


def encode(storage: MasterStorage, master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    half, stored = torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=storage.dtype)
    storage.encode(master.clone(), half, stored, torch.empty_like(master))
    return half, stored


def decode(storage: MasterStorage, half: Tensor, stored: Tensor) -> Tensor:
    out = torch.empty_like(half, dtype=torch.float32)
    return storage.decode(half, stored, out, torch.empty_like(out)).clone()


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return torch.equal(a.view(integer), b.view(integer))


def bit_patterns(count: int) -> Tensor:
    """Any float32 at all whose rounding to bfloat16 is finite, the ties and both zeros among them."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    ties = (bits[: count // 8] & -0x10000) | 0x8000
    values = torch.cat([bits, ties, torch.tensor([0, -(2**31), 1, 0x7FFFFF, 0x800000], dtype=torch.int32)])
    values = values.view(torch.float32)
    return values[values.abs() < torch.finfo(torch.bfloat16).max]


def fp16_range(count: int, lowest: float) -> Tensor:
    """float32 of every magnitude from `lowest` to fp16's largest, evenly over the exponents, both signs."""
    generator = torch.Generator().manual_seed(0)
    low, high = torch.log2(torch.tensor([lowest, FP16_MAX]))
    values = 2.0 ** (torch.rand(count, generator=generator) * (high - low) + low)
    return (values * torch.where(torch.rand(count, generator=generator) < 0.5, -1, 1)).clamp(-FP16_MAX, FP16_MAX)


def test_split_is_the_fp32_master_bit_for_bit_in_bf16() -> None:
    master = bit_patterns(2**20)
    assert same_bits(decode(master_storage("split"), *encode(master_storage("split"), master, torch.bfloat16)), master)


def test_split_is_the_fp32_master_bit_for_bit_in_fp16_from_2_to_the_minus_16() -> None:
    master = torch.cat([fp16_range(2**20, SMALLEST_EXACT), torch.tensor([0.0, SMALLEST_EXACT, FP16_MAX, -FP16_MAX])])
    assert same_bits(decode(master_storage("split"), *encode(master_storage("split"), master, torch.float16)), master)


def test_split_is_within_2_to_the_minus_40_below() -> None:
    master = torch.cat([fp16_range(2**18, 2.0**-50).clamp(-SMALLEST_EXACT, SMALLEST_EXACT), torch.tensor([1e-45])])
    error = decode(master_storage("split"), *encode(master_storage("split"), master, torch.float16)).double() - master
    assert error.abs().max() <= 2.0**-40


@settings(max_examples=300, deadline=None)
@given(
    value=st.floats(width=32, min_value=-FP16_MAX, max_value=FP16_MAX),
    dtype=st.sampled_from(HALVES),
    name=st.sampled_from(sorted(MASTER_STORAGES)),
)
def test_decoding_and_encoding_again_gives_the_same_codes(value: float, dtype: torch.dtype, name: str) -> None:
    storage = master_storage(name)
    half, stored = encode(storage, torch.tensor([value]), dtype)
    again_half, again_stored = encode(storage, decode(storage, half, stored), dtype)
    assert same_bits(again_half, half)
    assert torch.equal(again_stored, stored)


def nearest_half(master: Tensor, dtype: torch.dtype) -> Tensor:
    """In float64: the nearest half number; ties to even in fp16, away from zero in bf16."""
    digits = {torch.float16: 10, torch.bfloat16: 7}[dtype]
    lowest_exponent = {torch.float16: -14, torch.bfloat16: -126}[dtype]
    value = master.double()
    exponent = torch.frexp(value).exponent - 1
    ulp = torch.ldexp(torch.ones_like(value), exponent.clamp(min=lowest_exponent) - digits)
    units = value / ulp
    rounded = units.round() if dtype == torch.float16 else units.sign() * (units.abs() + 0.5).floor()
    return (rounded * ulp).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", sorted(MASTER_STORAGES))
def test_the_half_weight_is_the_nearest(name: str, dtype: torch.dtype) -> None:
    """To the master as it is stored: an exact one is the FP32 value."""
    values = bit_patterns(2**18) if dtype == torch.bfloat16 else fp16_range(2**18, SMALLEST_EXACT)
    half, stored = encode(master_storage(name), values, dtype)
    assert torch.equal(half, nearest_half(decode(master_storage(name), half, stored), dtype))


def test_split_and_float32_round_alike_in_bf16() -> None:
    master = bit_patterns(2**18)
    split, _ = encode(master_storage("split"), master, torch.bfloat16)
    plain, _ = encode(master_storage("float32"), master, torch.bfloat16)
    assert same_bits(split, plain)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", sorted(MASTER_STORAGES))
def test_a_master_can_start_from_every_half_weight(name: str, dtype: torch.dtype) -> None:
    half = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    half = half[half.isfinite()]
    storage = master_storage(name)
    stored = storage.of_half(half)
    assert stored.dtype == storage.dtype
    assert stored.element_size() == storage.bytes_per_parameter
    assert torch.equal(decode(storage, half, stored), half.float())


def test_float32_masters_are_updated_where_they_lie() -> None:
    half, stored = torch.zeros(3, dtype=torch.bfloat16), torch.ones(3)
    assert master_storage("float32").decode(half, stored, torch.empty(3), torch.empty(3)) is stored


@pytest.mark.parametrize("name", ["fp32", "", None, 4, ["split"]])
def test_an_unknown_storage_is_named_with_those_that_exist(name: object) -> None:
    with pytest.raises(ValueError, match=r"master_weights=.* is not a way to store master weights.*'float32', 'split'"):
        master_storage(name)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"optimizer_state=.* is not a way to store the moments.*'float32'"):
        moment_storage(name)  # type: ignore[arg-type]


@pytest.mark.parametrize("dither", [None, 0, -1, 0x7FFFFFFF], ids=["nearest", "down", "up", "half"])
@pytest.mark.parametrize(("dtype", "ulp"), [(torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)], ids=str)
def test_split8_is_off_by_no_more_than_it_says(dtype: torch.dtype, ulp: float, dither: int | None) -> None:
    """Half a code to nearest, a code with dither; in fp16 twice that, about its ties and above powers of two."""
    master = fp16_range(2**18, 2.0**-14)
    half, stored = torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=torch.int8)
    thresholds = None if dither is None else torch.full(master.shape, dither, dtype=torch.int32)
    master_storage("split8").encode(master.clone(), half, stored, torch.empty_like(master), thresholds)
    error = decode(master_storage("split8"), half, stored).double() - master
    code = ulp * 2.0 ** (torch.frexp(master).exponent - 1).double() / 256
    to_nearest = 0.5 if dither in (None, 0x7FFFFFFF) else 1.0
    assert (error.abs() / code).max() <= to_nearest * (1 if dtype == torch.bfloat16 else 2)
    assert (error.abs() / code).median() <= 0.51 * to_nearest


def test_dither_makes_lossy_masters_right_on_average() -> None:
    for dtype in HALVES:
        master = fp16_range(2**12, 2.0**-10)
        total = torch.zeros_like(master, dtype=torch.float64)
        for step in range(256):
            half, stored = torch.empty_like(master, dtype=dtype), torch.empty_like(master, dtype=torch.int8)
            thresholds = ramp(len(master), master.device) + offset(0, torch.tensor(float(step)))
            master_storage("split8").encode(master.clone(), half, stored, torch.empty_like(master), thresholds)
            total += decode(master_storage("split8"), half, stored)
        error = (total / 256 - master) / master
        assert error.abs().median() <= 2.0**-22  # a 64th of what single ones are off by
