"""Working piece by piece: where a tensor is cut changes no bit of what training gives."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mpt import PRESETS, MasterAdamW, pieces
from lightning_mpt.pieces import VECTOR, piece_length

SIZES = (3, 1000, 5003, 30011)


def trained(options: dict[str, Any], dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights and state after three steps of AdamW with clipping."""
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(size, generator=generator).to(dtype)) for size in SIZES]
    optimizer = MasterAdamW(parameters, lr=1e-2, **options)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(3.0), torch.zeros(())
        optimizer.clip_value = 0.5
        optimizer.step()
    states = [value for entry in optimizer.state_dict()["state"].values() for value in entry.values()]
    return [*(parameter.detach() for parameter in parameters), *states]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", ["exact", "compact"])
def test_where_it_is_cut_changes_no_bit(preset: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(PRESETS[preset], dtype)
    for elements in (700, 9000, 40000):
        monkeypatch.setattr(pieces, "SMALLEST_SCRATCH", elements)
        torch.testing.assert_close(trained(PRESETS[preset], dtype), whole, rtol=0, atol=0)


@given(
    sizes=st.lists(st.integers(0, 10**7), min_size=1, max_size=4),
    rows=st.integers(1, 8),
    multiple=st.sampled_from([1, 32, 256]),
    model_numel=st.integers(0, 10**9),
)
def test_pieces_are_whole_vectors_and_blocks_and_little_beside_the_model(
    sizes: list[int], rows: int, multiple: int, model_numel: int
) -> None:
    tensors = [torch.empty(size, device="meta") for size in sizes]
    length = piece_length(tensors, rows, multiple, model_numel=model_numel)
    assert length % multiple == 0
    assert length % VECTOR == 0
    model = max(model_numel, sum(sizes))
    most = max(min(pieces.SMALLEST_SCRATCH, model), model // 16)
    assert rows * (length - max(multiple, VECTOR)) <= most
