"""The profiler on a GPU: the replayed history against the allocator's own statistics."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from training import fit

from lightning_mpt import MasterWeightPrecision
from lightning_mpt.profiler import Category, MemoryProfiler, MemoryRecorder, MemoryReport
from lightning_mpt.profiler.collect.sources import CUDASource

from .loops import gpt2, mlp

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def bytes_in_no_workspace() -> int:
    """What other tests of this process have left on the device, libraries' workspaces apart."""
    gc.collect()
    source = CUDASource(torch.device("cuda"))
    return sum(block.bytes for block in source.live_blocks() if block.requested_bytes not in source.workspace_bytes)


def record(tmp_path: Path | None = None, *, half: bool = False) -> tuple[MemoryReport, dict[str, int]]:
    """A GPT-2 on the GPU, and the allocator's statistics after the recorded steps."""
    loop = gpt2()
    loop.module.cuda()
    if half:
        loop.module.bfloat16()
    trace = None if tmp_path is None else tmp_path / "trace.json"
    with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=2, steps=2, save_trace=trace) as recorder:
        for _ in range(4):
            tokens = torch.randint(0, 256, (16, 128), device="cuda")
            loop.module(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            loop.optimizer.step()
            loop.optimizer.zero_grad()
            torch.cuda.synchronize()
            stats = torch.cuda.memory_stats()
            recorder.step()
    return recorder.report, stats


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
def test_the_replay_reaches_the_allocators_own_peak(half: bool) -> None:
    report, stats = record(half=half)
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.peak_bytes >= stats["allocated_bytes.all.peak"]
    replayed = max(phase.peak_bytes for phase in report.phases.values())
    assert replayed == pytest.approx(report.peak_bytes, rel=0.001)
    assert report.categories[Category.UNATTRIBUTED] <= 0.01 * report.peak_bytes
    assert report.categories[Category.ROUNDING] == pytest.approx(
        stats["allocated_bytes.all.peak"] - stats["requested_bytes.all.peak"], abs=0.005 * report.peak_bytes
    )
    assert report.reserved_bytes >= report.peak_bytes


# Of an LSTM in bf16, whose weights torch does not keep in one piece (`torch.backends.cudnn.CUDNN_TENSOR_DTYPES`).
@pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk:UserWarning")
@pytest.mark.parametrize("precision", ["32-true", "16-true", "bf16-true"])
@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_byte_of_a_network_has_its_name(
    name: str, precision: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the report goes
    of_others = bytes_in_no_workspace()
    module, batch = zoo.make(name)
    profiler = MemoryProfiler(warmup_steps=4, steps=2)
    plugin = None if precision == "32-true" else MasterWeightPrecision(precision)
    fit(module, [batch] * 6, plugin, profiler=profiler, accelerator="cuda", devices=1)
    report = profiler.report
    assert sum(report.categories.values()) == report.peak_bytes
    assert max(phase.peak_bytes for phase in report.phases.values()) == report.peak_bytes  # replayed, and told
    # Nearly all of so small a network's peak is cuBLAS's workspaces: of the rest too all is named.
    assert report.health is not None
    own = report.peak_bytes - report.health.workspace_bytes
    assert report.categories[Category.UNATTRIBUTED] <= 0.01 * own + of_others
    assert report.modules


def test_model_state_on_the_gpu() -> None:
    report, _ = record()
    assert report.categories[Category.WEIGHTS] == 4 * report.parameters
    assert report.phases["optimizer_step"].categories[Category.GRADIENTS] == 4 * report.parameters
    state = report.categories[Category.OPTIMIZER_STATE]
    assert 8 * report.parameters <= state <= 8 * report.parameters + 4 * 100


def test_a_trace_of_the_gpu_replays(tmp_path: Path) -> None:
    report, _ = record(tmp_path)
    assert MemoryReport.from_trace(tmp_path / "trace.json") == report


def test_the_history_is_off_afterwards_also_after_an_exception() -> None:
    loop = mlp()
    loop.module.cuda()

    def fail() -> None:
        with MemoryRecorder(loop.module, loop.optimizer):
            assert torch._C._cuda_isHistoryEnabled()
            raise RuntimeError("the step fails")

    with pytest.raises(RuntimeError, match="the step fails"):
        fail()
    assert not torch._C._cuda_isHistoryEnabled()


def test_recording_changes_no_result_on_the_gpu() -> None:
    states = []
    for recorded in (False, True):
        loop = mlp()
        loop.module.cuda()
        recorder = MemoryRecorder(loop.module, loop.optimizer)
        torch.manual_seed(1)
        for i in range(3):
            x = torch.randn(128, 64, device="cuda")
            if recorded and i == 1:
                with recorder:
                    loop.module(x).square().mean().backward()
                    loop.optimizer.step()
                    recorder.step()
            else:
                loop.module(x).square().mean().backward()
                loop.optimizer.step()
            loop.optimizer.zero_grad()
        states.append([parameter.detach().clone() for parameter in loop.module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
