"""The scan kernel: one read of all gradients, for whether they are finite and for their norm."""

import triton
import triton.language as tl

from .tile import load, offsets_of


@triton.jit
def scan_kernel(gradients, sizes, owners, numbers, squares, flags, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of the squares of a tile, and whether an element is not finite, to `squares` and `flags` (float32).

    `gradients` and `sizes` (int64) have an address and a number of elements for each tensor. Program i works on tile
    `numbers[i]` of tensor `owners[i]` (int32).
    """
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    start = tl.load(numbers + program).to(tl.int64) * BLOCK
    gradient = tl.load(gradients + owner)
    numel = tl.load(sizes + owner)
    if (gradient % 16 == 0) & (start + BLOCK <= numel):
        _scan(gradient, start, numel, squares + program, flags + program, GRADIENT, BLOCK, True)
    else:
        _scan(gradient, start, numel, squares + program, flags + program, GRADIENT, BLOCK, False)


@triton.jit
def _scan(gradient, start, numel, square, flag, GRADIENT: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    offsets = offsets_of(BLOCK)
    g = load(gradient, start, offsets, start + offsets < numel, GRADIENT, WHOLE).to(tl.float32)
    finite = (g.to(tl.int32, bitcast=True) & 0x7F800000) != 0x7F800000
    tl.store(square, tl.sum(tl.sum(g * g, axis=1), axis=0))
    tl.store(flag, tl.max(tl.max(tl.where(finite, 0.0, 1.0), axis=1), axis=0))
