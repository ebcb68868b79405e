"""The largest batch that fits a given memory.

The peak of a step is the highest of several moments, and each grows by the same bytes with every sample: so the peak as
a function of the batch is a line that bends upward at most. A straight line through two sizes says where to look, and
every answer is checked: the batch fits, and one sample more does not.
"""

from collections.abc import Callable

LARGEST = 2**20
"""Samples; no one looks further."""
_BY_LINES = 8
"""Sizes found by straight lines; if more are needed the peak is no line, and the range is halved from then on."""


def largest_batch(peak_of: Callable[[int], int], memory_bytes: int, first: int = 1) -> int:
    """The largest number of samples whose step fits, 0 where not even one does.

    Args:
        peak_of: bytes at the peak of a step with that many samples, never falling with them.
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
        guess = _by_line(known, memory_bytes) if len(known) < _BY_LINES else _by_halves(fits, too_many)
        size = min(max(guess, fits + 1), too_many - 1)
    return fits


def _by_line(known: dict[int, int], memory_bytes: int) -> int:
    """Where the line through two sizes meets the memory: one that fits and one that does not, if there are both."""
    fitting = sorted(size for size in known if known[size] <= memory_bytes)
    others = sorted(known.keys() - fitting)
    if len(known) == 1:
        return fitting[0] * 2 if fitting else others[0] // 2
    low, high = (fitting[-1], others[0]) if fitting and others else fitting[-2:] or others[:2]
    slope = (known[high] - known[low]) / (high - low)
    return int(low + (memory_bytes - known[low]) / slope) if slope > 0 else 2 * high


def _by_halves(fits: int, too_many: int) -> int:
    return (fits + too_many) // 2 if too_many <= LARGEST else 2 * fits
