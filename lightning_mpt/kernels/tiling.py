"""How tensors are cut into tiles for the kernels on CUDA: told without Triton, which need not be installed."""

from collections.abc import Sequence

BLOCK = 2048
"""Elements that a program of the update works on: 16 for each of its 128 threads, 16 bytes of the smallest codes."""
TAIL = 256
SCAN_BLOCK = 8192
RELEASES = 32
"""Gradients that wait take 1/32 of what all do: 0.06 bytes a parameter."""
LARGEST_RELEASED = 2**26
"""Elements: some 800 MB to move, which takes a GPU about as long as the host needs for a launch."""


def tile_counts(sizes: Sequence[int], block: int) -> list[int]:
    """How many tiles tensors of these sizes have."""
    return [-(-size // block) for size in sizes]


def elements_worth_a_launch(model_numel: int) -> int:
    """How many elements of released gradients wait for one another, in a model of so many parameters.

    A launch for each parameter takes the host longer than the device; all of them together would be what release is to
    spare.
    """
    return max(1, min(LARGEST_RELEASED, model_numel // RELEASES))
