"""What a reader must know to trust the figures: a bound that was reached, modules that cannot be told apart."""

import pytest
import torch

from lightning_mpt.profiler import Category, MemoryRecorder

from .loops import blocks, mlp, record


def test_a_recording_ends_with_the_step_that_fills_it() -> None:
    whole = record(mlp(), steps=6)
    assert whole.notes == ()
    loop = mlp()
    with MemoryRecorder(loop.module, loop.optimizer, max_events=210) as recorder:
        while torch._C._autograd._profiler_enabled():
            loop.step(0)
            recorder.step()
        loop.step(0)
        recorder.step()
    report = recorder.report
    assert report.steps > 1
    assert report.notes == (f"The recording ended after {report.steps} steps, when max_events=210 was reached.",)
    assert report.peak_bytes == whole.peak_bytes


def test_a_first_step_that_is_too_large_is_reported_with_what_was_dropped() -> None:
    report = record(mlp(), max_events=1)
    assert report.steps == 1
    assert len(report.notes) == 2
    assert "after 1 step, when max_events=1" in report.notes[0]
    assert "nothing was kept" in report.notes[1]
    assert report.categories[Category.WEIGHTS] == 4 * report.parameters
    assert report.categories[Category.ACTIVATIONS] == 0
    assert report.peak_bytes == record(mlp()).peak_bytes


# torch.compile asks its inputs for their gradients, leaves or not, and torch warns of that.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("in_place", [False, True])
def test_compiled_modules_are_named_as_merged(in_place: bool) -> None:
    loop = blocks()
    for i in (1, 2):
        if in_place:
            loop.module.blocks[i].compile(backend="aot_eager")
        else:
            loop.module.blocks[i] = torch.compile(loop.module.blocks[i], backend="aot_eager")
    report = record(loop)
    assert report.notes == (
        "Under torch.compile, what happens inside these modules is not told apart: blocks.1, blocks.2.",
    )
    assert report.forwards["blocks.0.0"].calls == 2
    assert "blocks.1.0" not in report.forwards
    assert report.categories[Category.UNATTRIBUTED] <= 0.01 * report.peak_bytes
