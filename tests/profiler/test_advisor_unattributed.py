"""What is advised of memory that has no owner: outputs and losses that the loop holds."""

import dataclasses

import pytest
import torch
from reports import MIB, transformer

from lightning_mpt.profiler import Category, MemoryRecorder, MemoryReport, TensorUse
from lightning_mpt.profiler.show.advisor import advise

from .test_advisor import find, said


@pytest.mark.parametrize("kept", [True, False])
def test_outputs_that_the_loop_holds_are_told_of(kept: bool) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Linear(64, 2000))
    optimizer = torch.optim.AdamW(network.parameters())
    with MemoryRecorder(network, optimizer, warmup_steps=1, steps=1) as recorder:
        for _ in range(2):
            logits = network(torch.randn(256, 8))
            loss = torch.nn.functional.cross_entropy(logits, torch.zeros(256, dtype=torch.long))
            if not kept:
                del logits
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            recorder.step()
    report, size = recorder.report, 256 * 2000 * 4
    if kept:
        assert report.categories[Category.UNATTRIBUTED] == pytest.approx(size, rel=0.01)
        text = advise(report)[0].text
        assert "1.95 MiB of it were born in forward, most in 1, and are kept by something other than autograd" in text
        assert "an attribute of a module" in text
        advice = find(advise(report), "Look for what keeps 1.95 MiB through backward, most of it born in 1,")
        assert advice.saves_bytes == pytest.approx(size, rel=0.01)
    else:
        assert report.categories[Category.UNATTRIBUTED] < 0.01 * report.peak_bytes
        assert "nattributed" not in said(report)
        assert "Look for what keeps" not in said(report)


@pytest.mark.parametrize("loss_of", ["mse_loss", "smooth_l1_loss", "soft_margin_loss", "binary_cross_entropy"])
def test_a_loss_whose_storage_is_as_large_as_the_output_is_told_of(loss_of: str) -> None:
    network = torch.nn.Sequential(torch.nn.Linear(8, 1000), torch.nn.Sigmoid())
    inputs, targets, size = torch.randn(256, 8), torch.rand(256, 1000), 256 * 1000 * 4

    def recorded(let_go: bool) -> MemoryReport:
        with MemoryRecorder(network, warmup_steps=1, steps=1) as recorder:
            for _ in range(2):
                loss = getattr(torch.nn.functional, loss_of)(network(inputs), targets)
                if let_go:
                    loss = loss.clone()
                loss.backward()
                recorder.step()
        return recorder.report

    held, let_go = recorded(False), recorded(True)
    assert held.categories[Category.UNATTRIBUTED] >= size
    assert "most outside the modules" in said(held)
    assert loss_of in said(held)
    assert "loss.clone() lets go of" in said(held)
    assert let_go.categories[Category.UNATTRIBUTED] < 64
    assert let_go.peak_bytes <= held.peak_bytes - size + 64  # scalars
    assert "nattributed" not in said(let_go)


def test_a_scalar_that_the_loop_holds_is_not_what_explains_much_that_has_no_owner() -> None:
    scalar = TensorUse(12, Category.UNATTRIBUTED, "net", None, None, "forward")
    report = dataclasses.replace(transformer(12), phases={}, categories={Category.UNATTRIBUTED: MIB}, tensors=(scalar,))
    assert advise(report)[0].text.endswith("Unattributed, 100.0%, has no owner that could be seen.")
