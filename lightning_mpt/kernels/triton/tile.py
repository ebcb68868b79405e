"""A tile: the elements of one parameter that one program works on, as rows of 128, and how it is read and written."""

import triton
import triton.language as tl

from ...storage.block8 import BLOCK as SHARING

COLUMNS = tl.constexpr(SHARING)
"""Elements in a row: those that share a scale in block-wise formats."""


@triton.jit
def offsets_of(BLOCK: tl.constexpr):
    """The elements' places within the tile, [BLOCK // COLUMNS, COLUMNS]."""
    rows = tl.arange(0, BLOCK // COLUMNS)
    return rows[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def pointers(address, start, offsets, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Pointers to elements `start + offsets` of the tensor at `address`.

    Of a `WHOLE` tile the address is known to be a multiple of 16, so that the compiler moves 16 bytes at a time.
    """
    pointer = address.to(tl.pointer_type(DTYPE))
    if WHOLE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start + offsets


@triton.jit
def load(address, start, offsets, mask, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """The elements as they are stored; 0 outside the tensor."""
    where = pointers(address, start, offsets, DTYPE, WHOLE)
    if WHOLE:
        return tl.load(where)
    return tl.load(where, mask=mask, other=0)


@triton.jit
def store(address, start, offsets, mask, value, DTYPE: tl.constexpr, WHOLE: tl.constexpr):
    """Write the elements that are within the tensor."""
    where = pointers(address, start, offsets, DTYPE, WHOLE)
    if WHOLE:
        tl.store(where, value)
    else:
        tl.store(where, value, mask=mask)
