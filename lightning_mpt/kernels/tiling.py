"""How tensors are cut into tiles for the kernels on CUDA: told without Triton, which need not be installed."""

from collections.abc import Sequence

BLOCK = 2048
"""Elements that a program of the update works on: 16 for each of its 128 threads, 16 bytes of the smallest codes."""
TAIL = 256
SCAN_BLOCK = 8192
RELEASES, LARGEST_RELEASED = 32, 2**24


def tile_counts(sizes: Sequence[int], block: int) -> list[int]:
    """How many tiles tensors of these sizes have."""
    return [-(-size // block) for size in sizes]


def elements_worth_a_launch(model_numel: int) -> int:
    """How many elements of released gradients wait for one another, in a model of so many parameters.

    A launch for each parameter takes longer than it runs; all of them together would be what release is to spare.
    """
    return max(1, min(LARGEST_RELEASED, model_numel // RELEASES))
