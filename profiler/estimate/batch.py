"""The largest batch that fits a given memory.

The peak of a step is the highest of several moments, and each grows by the same bytes with every sample: so the peak as
a function of the batch is a line that bends upward at most. A straight line through two sizes says where to look, and
every answer is checked: the batch fits, and one sample more does not.
"""

from collections.abc import Callable

LARGEST = 2**20
"""Samples; no one looks further."""


def largest_batch(peak_of: Callable[[int], int], memory_bytes: int, first: int = 1) -> int:
    """The largest number of samples whose step fits, 0 where not even one does.

    Args:
        peak_of: bytes at the peak of a step with that many samples, growing with them.
        memory_bytes: what there is.
        first: a size to begin with.
    """
    fits, too_many = 0, LARGEST + 1
    known: dict[int, int] = {}
    size = max(1, min(first, LARGEST))
    while too_many - fits > 1:
        known[size] = peak_of(size)
        if known[size] <= memory_bytes:
            fits = max(fits, size)
        else:
            too_many = min(too_many, size)
        size = _next(known, memory_bytes, fits, too_many)
    return fits


def _next(known: dict[int, int], memory_bytes: int, fits: int, too_many: int) -> int:
    """Where the line through the two sizes nearest to the answer meets the memory, between what is known of it."""
    nearest = sorted(known, key=lambda size: abs(known[size] - memory_bytes))[:2]
    if len(nearest) == 1:
        guess = nearest[0] * 2 if fits else nearest[0] // 2
    else:
        low, high = sorted(nearest)
        slope = (known[high] - known[low]) / (high - low)
        guess = int(low + (memory_bytes - known[low]) / slope) if slope > 0 else 2 * high
    if guess == fits:  # then this is the answer, if one more does not fit
        guess = fits + 1
    return min(max(guess, fits + 1), too_many - 1)
