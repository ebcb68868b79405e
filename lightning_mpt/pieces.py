"""Walking over tensors piece by piece, so that conversions need neither much memory nor many trips to it."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

LARGEST_PIECE = {"cpu": 2**19}
"""Elements worked on at once with two rows of scratch: on a CPU, what its caches hold; elsewhere `DEFAULT_PIECE`."""
DEFAULT_PIECE = 2**22
SMALLEST_SCRATCH = 3 * 2**16
"""Elements, of all rows together: 768 KiB, or as many as the model has. In less, calls take longer than their work."""
PIECES_PER_MODEL_AND_ROW = 16
"""A row of scratch takes 4 bytes an element. So all rows together take a quarter of a byte for each of the model's
parameters, under 5 % of the smallest state; a model too small for that has `SMALLEST_SCRATCH`."""
VECTOR = 64
"""Elements. Cuts are at multiples of it, so that a CPU's vector instructions, which round otherwise than those for the
rest of a tensor, meet the same elements wherever it is cut. So a run resumes bit for bit, whatever was frozen then."""


def piece_length(tensors: Sequence[Tensor], rows: int = 2, multiple: int = 1, *, model_numel: int = 0) -> int:
    """Elements to work on at once: what stays in the cache, and is little beside the model.

    Args:
        tensors: all that is to be worked on.
        rows: how many float32 tensors of that length the work needs.
        multiple: what the length must be a whole multiple of; it is one of `VECTOR` in any case.
        model_numel: how many parameters the model has, where `tensors` may be a part of it.
    """
    total = sum(tensor.numel() for tensor in tensors)
    model_numel = max(model_numel, total)
    bound = LARGEST_PIECE.get(tensors[0].device.type, DEFAULT_PIECE) * 2 // rows
    scratch = max(min(SMALLEST_SCRATCH, model_numel), model_numel // PIECES_PER_MODEL_AND_ROW)
    length = max(1, min(bound, scratch // rows, total))
    multiple = math.lcm(multiple, VECTOR)
    return -(-length // multiple) * multiple


def pieces(numel: int, length: int) -> Iterator[slice]:
    """Slices of at most `length` that cover `numel` elements."""
    return (slice(start, min(start + length, numel)) for start in range(0, numel, length))


def dense(tensor: Tensor) -> Tensor:
    """`tensor` itself if its elements fill one stretch of memory, in whatever order; else a contiguous copy."""
    if tensor.is_contiguous() or _same_order(tensor, torch.empty_like(tensor, device="meta")):
        return tensor
    return tensor.contiguous()


def ordered_like(tensor: Tensor, pattern: Tensor) -> Tensor:
    """`tensor`, or a copy of it, with its elements in the order of `pattern`'s memory. Same shape, `pattern` dense."""
    if _same_order(tensor, pattern):
        return tensor
    return torch.empty_like(pattern, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _same_order(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape run through memory alike; the stride of a single element says nothing."""
    if a.stride() == b.stride():
        return True
    return all(size == 1 or x == y for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True))


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory: a view of one dimension."""
    return tensor.as_strided((tensor.numel(),), (1,))
