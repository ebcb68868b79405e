"""What is known of every module: its forward passes, and whether they are seen."""

import time
from typing import Any

import pytest
import torch
from torch import nn

from lightning_mpt.profiler import MemoryRecorder, MemoryReport
from lightning_mpt.profiler.collect.modules import ModuleForwards

from .loops import blocks, mlp


def record(module: nn.Module, steps: int = 2, warmup_steps: int = 1) -> MemoryReport:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with MemoryRecorder(module, optimizer, warmup_steps=warmup_steps) as recorder:
        for _ in range(warmup_steps + steps):
            module(torch.randn(256, 64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    return recorder.report


class Twice(nn.Module):
    """Calls one child twice, the second time with half of the batch; sleeps in between."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        whole = self.child(x)
        time.sleep(0.002)
        return whole[: len(x) // 2] + self.child(x[: len(x) // 2])


def test_forward_passes_of_the_counted_steps_are_counted() -> None:
    forwards = record(Twice(), steps=3).forwards
    assert {path: forward.calls for path, forward in forwards.items()} == {"": 3, "child": 6}
    assert forwards["child"].output_bytes == 256 * 32 * 4  # of the largest call
    assert forwards[""].output_bytes == 128 * 32 * 4
    assert forwards[""].time_ns >= forwards["child"].time_ns + 3 * 2_000_000


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["whole", "non-reentrant", "reentrant"])
def test_what_a_checkpoint_runs_again_in_backward_is_not_counted(reentrant: bool | None) -> None:
    forwards = record(blocks(reentrant).module).forwards
    assert {forward.calls for forward in forwards.values()} == {2}
    assert set(forwards) == {"", "first"} | {f"blocks.{i}{j}" for i in range(4) for j in ("", ".0", ".1", ".2", ".3")}


def test_outputs_are_the_tensors_in_what_a_module_gives() -> None:
    def size(output: Any) -> int:
        forwards = ModuleForwards()
        forwards.add("", 1, output)
        return forwards.by_path()[""].output_bytes

    x = torch.ones(10, 4)
    assert size(x) == 160
    assert size({"a": [x, x], "b": (torch.ones(3, dtype=torch.half),)}) == 160 + 6  # one tensor once
    assert size(x[:2]) == 32  # a view is as large as it looks
    assert size(None) == size("logits") == 0


def test_optimizers_have_names() -> None:
    loop = mlp()
    others = [torch.optim.SGD(loop.module.parameters(), lr=0.1), loop.optimizer]
    with MemoryRecorder(loop.module, others) as recorder:
        loop.step(0)
        recorder.step()
    assert recorder.report.optimizers == ("SGD", "AdamW")
