"""Several processes: each keeps its report, and the worst is shown. With gloo, on CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_mpt.profiler import Category, MemoryProfiler, MemoryReport
from lightning_mpt.profiler.ranks import worst
from lightning_mpt.profiler.recording import Claim, Event, Mark, Recording, Window

from .test_lightning import Classifier, data, trainer


def report(size: int) -> MemoryReport:
    claim = Claim(2, 1, size, Category.WEIGHTS, "", (size,), "uint8")
    history = Recording("cpu", size, events=[Event(1, 1, size, size)], claims=[claim])
    history.phases, history.windows = [Mark(0, "forward")], [Window(0, 9, None)]
    return MemoryReport.from_recording(history)


def test_alone_a_process_is_the_worst() -> None:
    assert worst(report(100)) == (0, report(100))
    assert worst(None) == (0, None)


class Uneven(Classifier):
    """Saves more in the second process."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        more = 8 if self.global_rank else 1
        return super().training_step((x.repeat(more, 1), y.repeat(more)), batch_idx)


def fit(path: str) -> None:
    torch.set_num_threads(1)
    trainer(MemoryProfiler(), path, devices=2, strategy="ddp_spawn", max_steps=4).fit(Uneven(), data())


@pytest.mark.slow  # each process imports torch and Lightning anew
def test_every_rank_has_its_file_and_the_first_prints_the_worst(tmp_path: Path, capfd: Any) -> None:
    fit(str(tmp_path))
    first, second = (MemoryReport.load(tmp_path / f"memory_report{rank}.json") for rank in ("", "-1"))
    assert first.categories[Category.WEIGHTS] == second.categories[Category.WEIGHTS]
    assert second.peak_bytes > first.peak_bytes
    printed = capfd.readouterr().out
    assert "Of 2 processes, that of rank 1 has the highest peak:" in printed
    assert printed.count("phase peaks") == 1
    assert f"{second.peak_bytes / 2**20:.2f} MiB" in printed or f"{second.peak_bytes / 2**10:.2f} KiB" in printed
