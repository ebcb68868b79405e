"""Memory that grows from step to step: is it seen where it is, and only there?"""

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_mpt.profiler import Category, MemoryRecorder, MemoryReport
from lightning_mpt.profiler.show.advisor import advise

BATCH_BYTES = 256 * 64 * 4
WIDE_BYTES = 256 * 128 * 4


def report_of(kept: str, steps: int = 3) -> MemoryReport:
    """Of a loop that keeps what `kept` says from every step."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 1))
    optimizer = torch.optim.AdamW(module.parameters())
    total, outputs = torch.zeros(()), []
    with MemoryRecorder(module, optimizer, warmup_steps=1, steps=steps) as recorder:
        for _ in range(steps + 1):
            x = torch.randn(256, 64)
            output = module(x)
            loss = output.square().mean()
            loss.backward(retain_graph=kept == "graphs")
            optimizer.step()
            optimizer.zero_grad()
            total = total + (loss if kept == "graphs" else loss.detach())
            if kept == "batches":
                outputs.append(x)
            elif kept == "queue":
                outputs = [*outputs[-1:], x]
            recorder.step()
    return recorder.report


def test_a_loss_that_is_added_up_with_its_graph_is_found(tmp_path: Path) -> None:
    report = report_of("graphs")
    assert report.growth is not None
    assert report.growth.step_bytes == pytest.approx(WIDE_BYTES + BATCH_BYTES, rel=0.02)
    assert report.growth.categories[Category.ACTIVATIONS] == pytest.approx(2 * WIDE_BYTES, rel=0.02)
    assert report.growth.modules["1"] == 2 * WIDE_BYTES
    assert "Memory grew by 193.00 KiB in every step, most of it activations from 1: " in advise(report)[1].text
    report.save(tmp_path / "report.json")
    assert MemoryReport.load(tmp_path / "report.json") == report


def test_batches_in_a_list_are_found() -> None:
    growth = report_of("batches").growth
    assert growth is not None
    assert growth.step_bytes == BATCH_BYTES
    assert growth.categories == {Category.INPUTS: 2 * BATCH_BYTES}


@pytest.mark.parametrize(("kept", "steps"), [("nothing", 3), ("queue", 4), ("graphs", 2)])
def test_a_loop_that_lets_go_or_is_too_short_to_tell_has_none(kept: str, steps: int) -> None:
    assert report_of(kept, steps).growth is None
