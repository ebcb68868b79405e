"""The storage formats as the kernel sees them: how a tile is loaded as FP32 and stored again.

What they compute is said, and why it is so, in `lightning_mpt/storage/`, file by file. Masters are loaded and stored
together with the half weight that they round to. `bits` is the dither of each element (`storage/dither.py`).
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.runtime import JITFunction

from .tile import COLUMNS, load, store

# -- master weights ---------------------------------------------------------------------------------------------------


@triton.jit
def load_itself(weight, master, start, offsets, mask, HALF: tl.constexpr, WHOLE: tl.constexpr):
    """A float32 weight is its own master."""
    return load(weight, start, offsets, mask, tl.float32, WHOLE)


@triton.jit
def store_itself(value, weight, master, start, offsets, mask, bits, HALF: tl.constexpr, WHOLE: tl.constexpr):
    store(weight, start, offsets, mask, value, tl.float32, WHOLE)


@triton.jit
def load_float32(weight, master, start, offsets, mask, HALF: tl.constexpr, WHOLE: tl.constexpr):
    return load(master, start, offsets, mask, tl.float32, WHOLE)


@triton.jit
def store_float32(value, weight, master, start, offsets, mask, bits, HALF: tl.constexpr, WHOLE: tl.constexpr):
    store(master, start, offsets, mask, value, tl.float32, WHOLE)
    _store_half(_rounded(value, HALF), weight, start, offsets, mask, WHOLE)


@triton.jit
def load_split(weight, master, start, offsets, mask, HALF: tl.constexpr, WHOLE: tl.constexpr):
    half = load(weight, start, offsets, mask, tl.int16, WHOLE)
    correction = load(master, start, offsets, mask, tl.int16, WHOLE)
    if tl.bfloat16 == HALF:
        return ((half.to(tl.int32) << 16) + _correction_bits(half, correction)).to(tl.float32, bitcast=True)
    return correction.to(tl.float32) * _unit(half, 15) + half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def store_split(value, weight, master, start, offsets, mask, bits, HALF: tl.constexpr, WHOLE: tl.constexpr):
    if tl.bfloat16 == HALF:
        half = _rounded(value, HALF)
        correction = value.to(tl.int32, bitcast=True).to(tl.int16)  # the lower 16 bits
    else:
        value = _nearest_whole(value * 549755813888.0) * 1.8189894035458565e-12 + 0.0  # to the grid of 2**-39
        half = _rounded(value, HALF)
        difference = value - half.to(tl.float16, bitcast=True).to(tl.float32)
        units = difference * _units_per(half, 15)
        correction = tl.minimum(tl.maximum(units, -16384.0), 16384.0).to(tl.int16)
    _store_half(half, weight, start, offsets, mask, WHOLE)
    store(master, start, offsets, mask, correction, tl.int16, WHOLE)


@triton.jit
def load_split8(weight, master, start, offsets, mask, HALF: tl.constexpr, WHOLE: tl.constexpr):
    half = load(weight, start, offsets, mask, tl.int16, WHOLE)
    correction = load(master, start, offsets, mask, tl.int8, WHOLE)
    if tl.bfloat16 == HALF:
        return ((half.to(tl.int32) << 16) + (_correction_bits(half, correction) << 8)).to(tl.float32, bitcast=True)
    return correction.to(tl.float32) * _unit(half, 8) + half.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def store_split8(value, weight, master, start, offsets, mask, bits, HALF: tl.constexpr, WHOLE: tl.constexpr):
    if tl.bfloat16 == HALF:
        rounded = (value.to(tl.int32, bitcast=True) + (bits >> 24).to(tl.int32)) >> 8
        correction = rounded.to(tl.int8)  # the lower 8 bits
        half = _rounded((rounded << 8).to(tl.float32, bitcast=True), HALF)
    else:
        half = _rounded(value, HALF)
        half = tl.where(half == -32768, 0, half).to(tl.int16)  # -0 becomes 0
        difference = value - half.to(tl.float16, bitcast=True).to(tl.float32)
        units = tl.floor(difference * _units_per(half, 8) + _uniform(bits))
        correction = tl.minimum(tl.maximum(units, -127.0), 127.0).to(tl.int8)
    _store_half(half, weight, start, offsets, mask, WHOLE)
    store(master, start, offsets, mask, correction, tl.int8, WHOLE)


@triton.jit
def _correction_bits(half, correction):
    """Storage's `keep_written_zeros_`: 0 where a zero that somebody else wrote has a negative correction."""
    written = ((half.to(tl.int32) & 0x7FFF) == 0) & (correction < 0)
    return tl.where(written, 0, correction.to(tl.int32))


@triton.jit
def _store_half(half, weight, start, offsets, mask, WHOLE: tl.constexpr):
    store(weight, start, offsets, mask, half, tl.int16, WHOLE)


@triton.jit
def _rounded(value, HALF: tl.constexpr):
    """The bits of the nearest half number (int16): ties away from zero in bfloat16, to even in float16."""
    if tl.bfloat16 == HALF:
        return ((value.to(tl.int32, bitcast=True) + 0x8000) >> 16).to(tl.int16)
    return value.to(tl.float16).to(tl.int16, bitcast=True)


@triton.jit
def _exponent(half):
    """The biased exponents of float16 bits, 1 for subnormals: int32."""
    return tl.maximum((half.to(tl.int32) >> 10) & 0x1F, 1)


@triton.jit
def _unit(half, BITS: tl.constexpr):
    """2**-BITS of a unit in the last place of float16 bits."""
    return ((_exponent(half) + (102 - BITS)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _units_per(half, BITS: tl.constexpr):
    """One over `_unit`."""
    return (((152 + BITS) - _exponent(half)) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _nearest_whole(value):
    """To the nearest whole number, ties to even. From 2**23 on all numbers are whole."""
    magnitude = tl.abs(value)
    whole = (magnitude + 8388608.0) - 8388608.0
    whole = tl.where(magnitude < 8388608.0, whole, magnitude)
    return tl.where(value < 0, -whole, whole)


# -- moments ----------------------------------------------------------------------------------------------------------


@triton.jit
def load_float32_moment(codes, scales, start, offsets, mask, numel, SIGNED: tl.constexpr, WHOLE: tl.constexpr):
    return load(codes, start, offsets, mask, tl.float32, WHOLE)


@triton.jit
def store_float32_moment(
    value, codes, scales, start, offsets, mask, numel, bits, SIGNED: tl.constexpr, WHOLE: tl.constexpr
):
    store(codes, start, offsets, mask, value, tl.float32, WHOLE)


@triton.jit
def load_bfloat16_moment(codes, scales, start, offsets, mask, numel, SIGNED: tl.constexpr, WHOLE: tl.constexpr):
    return (load(codes, start, offsets, mask, tl.int16, WHOLE).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def store_bfloat16_moment(
    value, codes, scales, start, offsets, mask, numel, bits, SIGNED: tl.constexpr, WHOLE: tl.constexpr
):
    rounded = (value.to(tl.int32, bitcast=True) + (bits >> 16).to(tl.int32)) >> 16
    store(codes, start, offsets, mask, rounded.to(tl.int16), tl.int16, WHOLE)


@triton.jit
def load_8bit_moment(codes, scales, start, offsets, mask, numel, SIGNED: tl.constexpr, WHOLE: tl.constexpr):
    if SIGNED:
        code = load(codes, start, offsets, mask, tl.int8, WHOLE).to(tl.float32)
        share = code * tl.abs(code) * (1 / 127**2)
    else:
        code = load(codes, start, offsets, mask, tl.uint8, WHOLE).to(tl.float32)
        share = _fourth_power(code)
    where, exists = _scale_pointers(scales, start, numel, offsets.shape[0], WHOLE)
    return share * tl.load(where, mask=exists, other=0.0)[:, None]


@triton.jit
def store_8bit_moment(
    value, codes, scales, start, offsets, mask, numel, bits, SIGNED: tl.constexpr, WHOLE: tl.constexpr
):
    magnitude = tl.abs(value)
    if not WHOLE:
        magnitude = tl.where(mask, magnitude, 0.0)
    scale = tl.max(magnitude, axis=1)
    where, exists = _scale_pointers(scales, start, numel, offsets.shape[0], WHOLE)
    tl.store(where, scale, mask=exists)
    share = magnitude * (1.0 / tl.where(scale == 0.0, 1.0, scale))[:, None]
    if SIGNED:
        code = tl.floor(tl.sqrt(share) * 127.0)
        below = code * code * (1 / 127**2)
        above = (code + 1.0) * (code + 1.0) * (1 / 127**2)
    else:
        code = tl.floor(tl.sqrt(tl.sqrt(share)) * 255.0)
        below = _fourth_power(code)
        above = _fourth_power(code + 1.0)
    code += (share - below > (above - below) * _uniform(bits)).to(tl.float32)
    if SIGNED:
        code = tl.where(magnitude == scale[:, None], 127.0, tl.minimum(code, 127.0))
        code = tl.where(scale[:, None] == 0.0, 0.0, code)
        store(codes, start, offsets, mask, tl.where(value < 0, -code, code).to(tl.int8), tl.int8, WHOLE)
    else:
        code = tl.where(magnitude == scale[:, None], 255.0, tl.minimum(tl.maximum(code, 1.0), 255.0))
        code = tl.where(magnitude == 0.0, 0.0, code)
        store(codes, start, offsets, mask, code.to(tl.uint8), tl.uint8, WHOLE)


@triton.jit
def _fourth_power(code):
    square = code * code * (1 / 255**2)
    return square * square


@triton.jit
def _scale_pointers(scales, start, numel, ROWS: tl.constexpr, WHOLE: tl.constexpr):
    """Where the scales of a tile's rows are, and which of them exist."""
    first = start // COLUMNS
    rows = tl.arange(0, ROWS)
    exists = first + rows < tl.cdiv(numel, COLUMNS)
    return scales.to(tl.pointer_type(tl.float32)) + first + rows, exists


@triton.jit
def _uniform(bits):
    """Thresholds in [0, 1) of uint32."""
    return (bits >> 8).to(tl.int32).to(tl.float32) * 5.960464477539063e-08  # 2**-24


# -- by name ----------------------------------------------------------------------------------------------------------


class Format(NamedTuple):
    """How the kernel loads and stores a storage format."""

    load: JITFunction
    store: JITFunction


ITSELF = Format(load_itself, store_itself)
MASTER_FORMATS = {
    "float32": Format(load_float32, store_float32),
    "split": Format(load_split, store_split),
    "split8": Format(load_split8, store_split8),
}
MOMENT_FORMATS = {
    "float32": Format(load_float32_moment, store_float32_moment),
    "bfloat16": Format(load_bfloat16_moment, store_bfloat16_moment),
    "8bit": Format(load_8bit_moment, store_8bit_moment),
}
