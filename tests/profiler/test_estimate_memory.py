"""Memory that is not there: which storages are told of, from when to when, and which numbers are known."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_mpt.profiler.collect.sources import CPUSource
from lightning_mpt.profiler.estimate.memory import DataDependent, FakeFunctions, FakeMemory
from lightning_mpt.profiler.estimate.scratch import cpu_unknowns
from lightning_mpt.profiler.recording import Event

KIB = 1024


@contextmanager
def recording(memory: FakeMemory) -> Iterator[FakeMemory]:
    with FakeTensorMode(), memory, FakeFunctions():
        memory.start()
        yield memory
        memory.stop()


def highest(events: list[Event]) -> int:
    """The peak that the events come to."""
    live: dict[int, int] = {}
    peak = 0
    for event in sorted(events):
        if event.bytes > 0:
            assert event.address not in live
            live[event.address] = event.bytes
        else:
            live.pop(event.address, None)
        peak = max(peak, sum(live.values()))
    return peak


def kib(**options: object) -> Tensor:
    return torch.empty(256, dtype=torch.float32, **options)  # type: ignore[call-overload]


def test_a_storage_is_born_with_its_first_tensor_and_dies_with_its_last() -> None:
    with recording(FakeMemory()) as memory:
        tensor = kib()
        view = tensor.view(16, 16)[3]
        del tensor
        assert [event.bytes for event in memory._events] == [KIB]
        address = memory.address_of(view.untyped_storage())
        del view
    _, events = memory.stop()
    assert [(event.address, event.bytes) for event in events] == [(address, KIB), (address, 0)]
    assert address > 0


def test_writing_in_place_makes_nothing_new() -> None:
    with recording(FakeMemory()) as memory:
        tensors = [kib(), kib()]
        tensors[0].add_(1).mul_(2).copy_(tensors[1])
        torch._foreach_add_(tensors, 1)
        torch.add(tensors[0], 1, out=tensors[1])
        assert len(memory._events) == 2


def test_what_is_older_than_the_recording_is_told_at_its_start_with_its_workspace_and_in_whole_blocks() -> None:
    memory = FakeMemory(block_bytes=512, workspace_bytes=4 * KIB)
    with FakeTensorMode(), memory:
        older = torch.empty(100, dtype=torch.uint8)
        memory.start()
        del older
        start, events = memory.stop()
    assert [(event.bytes, event.requested_bytes) for event in start] == [(4 * KIB, 4 * KIB), (512, 100)]
    assert [(event.address, event.bytes) for event in events] == [(start[1].address, 0)]
    assert memory.workspace_bytes == [4 * KIB]


def test_a_storage_that_is_resized_is_another_block() -> None:
    with recording(FakeMemory()) as memory:
        tensor = kib()
        tensor.resize_(512)
        sizes = [event.bytes for event in memory._events]
    assert sizes == [KIB, 0, 2 * KIB]


def sums_of_gradients(hold: bool) -> None:
    """y's gradient is a sum of three; with `hold` someone keeps each of the three."""
    kept: list[Tensor] = []
    x = torch.empty(1 << 16, requires_grad=True)
    y = x * 1.0
    branches = [y.exp(), y.cos(), y.sin()]
    for branch in branches:
        if hold:
            branch.grad_fn.register_hook(lambda inputs, outputs: kept.extend(inputs))
    (branches[0] + branches[1] + branches[2]).square().sum().backward()


def sums_of_views() -> None:
    """The weight's gradient is a sum of three products, each transposed."""
    weight = torch.empty(256, 256, requires_grad=True)
    x = torch.empty(4, 256)
    for _ in range(3):
        x = torch.nn.functional.linear(x, weight)
    x.square().sum().backward()


@pytest.mark.parametrize(
    "sums",
    [partial(sums_of_gradients, False), partial(sums_of_gradients, True), sums_of_views],
    ids=["let-go", "held", "views"],
)
def test_the_engine_adds_gradients_up_where_it_does_on_real_tensors(sums: Callable[[], None]) -> None:
    """In place where no one else holds them, else beside them: the peak is that of the allocator's events."""
    sums()  # what is made once is made
    source = CPUSource()
    source.start()
    sums()
    _, measured = source.stop()
    memory = FakeMemory()
    with FakeTensorMode(), memory:
        memory.start()
        sums()
        _, imagined = memory.stop()
    scalars = 64
    assert highest(imagined) == pytest.approx(highest(measured), abs=scalars)


def test_modules_can_be_copied_with_their_parameters() -> None:
    with recording(FakeMemory()) as memory:
        layer = nn.Linear(16, 16)
        before = len(memory._events)
        twin = copy.deepcopy(layer)
        assert isinstance(twin.weight, nn.Parameter)
        assert twin.weight.requires_grad
        assert twin.weight is not layer.weight
        assert sum(event.bytes for event in memory._events[before:]) == (16 * 16 + 16) * 4
        tied = copy.deepcopy([layer.weight, layer.weight])
        assert tied[0] is tied[1]


def test_constants_are_known_and_others_are_guessed_and_noted() -> None:
    with recording(FakeMemory()) as memory:
        assert torch.tensor(3.5).item() == 3.5
        assert not memory.guesses
        assert (torch.tensor(3.5) + torch.rand(())).item() == 1.0
        assert bool(torch.rand(3).isfinite().all())
        constant = torch.tensor(3.5)
        constant.add_(torch.rand(()))
        assert constant.item() == 1.0  # written to, so no longer known
    assert [sum(memory.guesses.values()), *{name.partition(":")[0] for name in memory.guesses}] == [
        3,
        "test_estimate_memory.py",
    ]


@pytest.mark.parametrize("ask", [lambda t: int(t.argmax()), lambda t: t.numpy(), lambda t: t.long().tolist()])
def test_whole_numbers_and_arrays_are_refused(ask: object) -> None:
    memory = FakeMemory()
    with FakeTensorMode(), memory, FakeFunctions(), pytest.raises(DataDependent, match=r"test_estimate_memory.py:\d+"):
        ask(torch.rand(3))  # type: ignore[operator]


@pytest.mark.parametrize(
    ("layer", "said"), [(nn.Conv2d(4, 4, 1), True), (nn.ConvTranspose2d(4, 4, 3), True), (nn.Conv2d(4, 4, 3), False)]
)
def test_what_is_not_known_of_convolutions_on_a_cpu_is_said(layer: nn.Module, said: bool) -> None:
    assert any("oneDNN" in note for note in cpu_unknowns(nn.Sequential(layer))) == said
