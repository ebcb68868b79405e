"""The cross entropy kernels: each row's loss, and the gradient of its logits, in FP32 from half.

A row's sum of exponentials is taken relative to the largest logit so far, and corrected when a larger one comes
(Milakov and Gimelshein, arXiv 1805.02867, algorithm 3).

Rows begin anywhere: GPT-2's have 50257 classes. So blocks are counted from the last multiple of 16 bytes before the
row, and those that lie within it are moved 16 bytes at a time; the first and the last are masked.
"""

import triton
import triton.language as tl

from .tile import load, offsets_of, store


@triton.jit
def row_losses_kernel(
    logits, target, losses, log_sums, classes, stride, ignore_index, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    """The loss of a row, and its log of the sum of exponentials, by one program. Rows are `stride` elements apart."""
    row = tl.program_id(0).to(tl.int64)
    base, first = _row(logits, row, stride)
    offsets = offsets_of(BLOCK)
    largest = -float("inf")
    total = 0.0
    for start in range(0, first + classes, BLOCK):
        places = start + offsets
        inside = (places >= first) & (places < first + classes)
        if (start >= first) & (start + BLOCK <= first + classes):
            x = load(base, start, offsets, inside, DTYPE, True).to(tl.float32)
        else:
            x = load(base, start, offsets, inside, DTYPE, False).to(tl.float32)
        x = tl.where(inside, x, -float("inf"))
        new = tl.maximum(largest, tl.max(tl.max(x, axis=1), axis=0))
        shift = tl.where(new == -float("inf"), 0.0, new)  # of nothing but -inf so far
        total = total * tl.exp(largest - shift) + tl.sum(tl.sum(tl.exp(x - shift), axis=1), axis=0)
        largest = new
    log_sum = tl.log(total) + tl.where(largest == -float("inf"), 0.0, largest)
    wanted = tl.load(target + row)
    counts = wanted != ignore_index
    picked = tl.load(logits + row * stride + tl.where(counts, wanted, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(counts, log_sum - picked, 0.0))
    tl.store(log_sums + row, log_sum)


@triton.jit
def gradient_kernel(
    logits, target, log_sums, gradient, result, classes, stride, ignore_index,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a row's logits in one block, by one program: (softmax - one hot) times that of the row's loss."""
    row = tl.program_id(0).to(tl.int64)
    base, first = _row(logits, row, stride)
    out, out_first = _row(result, row, classes)
    start = tl.program_id(1) * BLOCK
    if start < first + classes:
        wanted = tl.load(target + row)
        factor = tl.where(wanted != ignore_index, tl.load(gradient + row), 0.0)
        log_sum = tl.load(log_sums + row)
        wanted = tl.where(wanted != ignore_index, wanted, -1)
        if (start >= first) & (start + BLOCK <= first + classes) & (first == out_first):
            _gradient(base, out, start, first, 0, classes, wanted, factor, log_sum, DTYPE, BLOCK, True)
        else:
            _gradient(
                base, out, start, first, out_first - first, classes, wanted, factor, log_sum, DTYPE, BLOCK, False
            )  # fmt: skip


@triton.jit
def _gradient(
    base, out, start, first, moved, classes, wanted, factor, log_sum,
    DTYPE: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    offsets = offsets_of(BLOCK)
    places = start + offsets
    inside = (places >= first) & (places < first + classes)
    x = load(base, start, offsets, inside, DTYPE, WHOLE).to(tl.float32)
    softmax = tl.exp(x - log_sum)
    value = (softmax - tl.where(places - first == wanted, 1.0, 0.0)) * factor
    store(out, start + moved, offsets, inside, value.to(DTYPE), DTYPE, WHOLE)


@triton.jit
def _row(tensor, row, stride):
    """The last address before the row that is a multiple of 16, and how many elements further on the row begins."""
    address = tensor.to(tl.int64) + row * stride * 2
    before = address % 16
    return address - before, before // 2
