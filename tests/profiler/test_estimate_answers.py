"""The further answers of an estimate: the largest batch that fits, and what each of several ranks needs."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_mpt.profiler import Category, MemoryReport, PhasePeak
from lightning_mpt.profiler.estimate import largest_batch, per_rank
from lightning_mpt.profiler.estimate.batch import LARGEST

LINES = st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**6)), min_size=1, max_size=4)


@given(lines=LINES, memory=st.integers(0, 10**10), first=st.integers(1, 4096))
def test_the_largest_batch_fits_and_one_more_does_not(lines: list[tuple[int, int]], memory: int, first: int) -> None:
    asked = []

    def peak_of(size: int) -> int:
        asked.append(size)
        return max(state + each * size for state, each in lines)

    found = largest_batch(peak_of, memory, first)
    assert 0 <= found <= LARGEST
    assert found == 0 or peak_of(found) <= memory
    assert found == LARGEST or peak_of(found + 1) > memory
    assert all(1 <= size <= LARGEST + 1 for size in asked)


def test_few_sizes_are_tried() -> None:
    asked = []

    def peak_of(size: int) -> int:
        asked.append(size)
        return max(5_000_000 + 3_001 * size, 9_000_000 + 1_000 * size)

    assert largest_batch(peak_of, 24_000_000, 8) == (24_000_000 - 5_000_000) // 3_001
    assert len(asked) <= 8
    assert len(asked) == len(set(asked))


def report(gradients_in_step: int = 300) -> MemoryReport:
    """Two layers of 400 and 200 bytes of weights, and 100 of the root's own."""
    W, G, S, A = Category.WEIGHTS, Category.GRADIENTS, Category.OPTIMIZER_STATE, Category.ACTIVATIONS
    categories = {**dict.fromkeys(Category, 0), W: 700, G: 100, S: 1400, A: 5000}
    return MemoryReport(
        device="cuda (estimated)",
        peak_bytes=7200,
        reserved_bytes=None,
        categories=categories,
        phases={"optimizer_step": PhasePeak(3000, {G: gradients_in_step})},
        modules={"": {W: 60}, "head": {W: 40}, "h.0": {A: 5000}, "h.0.mlp": {W: 400}, "h.1": {W: 200}},
        tensors=(),
        duplicates=(),
        timeline=(),
        parameters=350,
        steps=1,
    )


def test_ddp_keeps_all_gradients_once_more() -> None:
    assert per_rank(report(), 8).ddp_bytes == 7200 + 300
    assert per_rank(report(gradients_in_step=0), 8).ddp_bytes is None


def test_fsdp2_keeps_a_part_and_gathers_two_layers() -> None:
    kept = 700 + 100 + 1400
    gathered = 100 + 400 + 200
    unreduced = 400 * 300 // 700
    assert per_rank(report(), 8).fsdp2_bytes == 7200 - kept + kept // 8 + gathered + unreduced
    assert per_rank(report(), 1).fsdp2_bytes == per_rank(report(), 1).ddp_bytes == 7200


def test_there_is_one_rank_at_least() -> None:
    with pytest.raises(ValueError, match="ranks=0"):
        per_rank(report(), 0)
