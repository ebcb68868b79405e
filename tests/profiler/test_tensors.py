"""What memory a tensor lies in, whatever its layout."""

from collections import deque
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.func import vmap

from lightning_mpt.profiler import Category
from lightning_mpt.profiler.collect.tensors import parts_of, tensors_in

from .loops import Loop, record

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")

SPARSE = {
    "coo": lambda dense: dense.to_sparse_coo().coalesce(),
    "csr": lambda dense: dense.to_sparse_csr(),
    "csc": lambda dense: dense.to_sparse_csc(),
    "bsr": lambda dense: dense.to_sparse_bsr((4, 4)),
    "bsc": lambda dense: dense.to_sparse_bsc((4, 4)),
}


def nested(*lengths: int) -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(length, 64) for length in lengths], layout=torch.jagged)


@pytest.mark.parametrize("layout", SPARSE)
def test_a_sparse_tensor_lies_in_its_indices_and_values(layout: str) -> None:
    dense = torch.eye(16)
    parts = list(parts_of(SPARSE[layout](dense)))
    assert all(part.layout is torch.strided for part in parts)
    assert len(parts) == (2 if layout == "coo" else 3)
    assert sum(part.sum().item() for part in parts if part.is_floating_point()) == 16


def test_a_nested_tensor_lies_in_its_values_and_offsets() -> None:
    parts = {tuple(part.shape) for part in parts_of(nested(3, 5))}
    assert {(8, 64), (3,)} <= parts


def test_within_a_transform_a_tensor_lies_where_that_which_it_stands_for_lies() -> None:
    x = torch.randn(4, 3)
    seen = []

    def look(row: torch.Tensor) -> torch.Tensor:
        seen.extend(part.data_ptr() for part in parts_of(row))
        return row

    vmap(look)(x)
    assert seen == [x.data_ptr()]


class Graph(nn.Module):
    """A layer of a graph network, its adjacency a sparse buffer."""

    def __init__(self, layout: str) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.register_buffer("adjacency", SPARSE[layout](torch.ones(256, 256).tril()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.adjacency @ x)


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_a_sparse_buffer_has_a_name(layout: str) -> None:
    module = Graph(layout)
    report = record(Loop(module, lambda model, g: model(torch.randn(256, 64, generator=g)).square().mean()))
    storages = {part.untyped_storage().data_ptr(): part.untyped_storage() for part in parts_of(module.adjacency)}
    assert report.categories[Category.BUFFERS] == sum(storage.nbytes() for storage in storages.values())
    assert report.categories[Category.BUFFERS] >= 256 * 257 // 2 * 12
    assert report.categories[Category.UNATTRIBUTED] <= 0.01 * report.peak_bytes


def test_a_nested_batch_has_a_name() -> None:
    module = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    report = record(Loop(module, lambda model, _: model(nested(300, 200, 100)).values().square().mean()))
    assert report.categories[Category.INPUTS] == pytest.approx(600 * 64 * 4, abs=64)  # and where each begins
    assert report.categories[Category.ACTIVATIONS] >= 600 * 128 * 4
    assert report.categories[Category.UNATTRIBUTED] <= 0.01 * report.peak_bytes


def test_tensors_in_slots_and_in_every_kind_of_container_are_found() -> None:
    @dataclass(slots=True)
    class Slotted:
        x: torch.Tensor
        name: str = "batch"

    class Both(Slotted):
        """With a dictionary of its own beside the slots that it inherits."""

    both = Both(torch.ones(1))
    both.y = torch.ones(2)  # type: ignore[attr-defined]
    held = [Slotted(torch.ones(3)), both, deque([torch.ones(4)]), frozenset([torch.ones(5)])]
    assert sorted(tensor.numel() for tensor in tensors_in(held)) == [1, 2, 3, 4, 5]
