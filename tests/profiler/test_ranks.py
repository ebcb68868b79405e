"""Several processes: each keeps its report, and the worst is shown. With gloo, on CPU."""

import os
import socket
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_mpt import MasterWeightPrecision
from lightning_mpt.profiler import Category, MemoryProfiler, MemoryReport
from lightning_mpt.profiler.ranks import worst
from lightning_mpt.profiler.recording import Claim, Event, Mark, Recording, Window

from .test_lightning import Classifier, data, trainer

GRADIENTS = Category.GRADIENTS


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


class Case(NamedTuple):
    """How gradients are kept, and how many bytes a parameter they take once all are there."""

    views: bool
    half: bool
    bytes_per_parameter: int


CASES = {
    "buckets beside gradients": Case(views=False, half=False, bytes_per_parameter=4 + 4),
    "gradients in buckets": Case(views=True, half=False, bytes_per_parameter=4),
    "half buckets beside gradients": Case(views=False, half=True, bytes_per_parameter=2 + 2),
    "half gradients in buckets": Case(views=True, half=True, bytes_per_parameter=2),
}


def train(rank: int, port: int, folder: str) -> None:
    """One of two processes: a fit for every case, and what it printed."""
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    for name, case in CASES.items():
        strategy = DDPStrategy(process_group_backend="gloo", gradient_as_bucket_view=case.views)
        plugins = [MasterWeightPrecision("bf16-true")] if case.half else []
        profiler = MemoryProfiler(folder, name, save_trace=f"{folder}/{name} trace.json")
        built = trainer(profiler, folder, devices=2, strategy=strategy, plugins=plugins, max_steps=6)
        with (Path(folder) / f"{name}-{rank}.txt").open("w") as file, redirect_stdout(file):
            built.fit(Uneven(), data())


class Ranks(NamedTuple):
    reports: tuple[MemoryReport, MemoryReport]
    replayed: tuple[MemoryReport, MemoryReport]
    printed: tuple[str, str]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ranks]:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, (port, str(folder)), nprocs=2)
    return {
        name: Ranks(
            (MemoryReport.load(folder / f"{name}.json"), MemoryReport.load(folder / f"{name}-1.json")),
            (
                MemoryReport.from_trace(folder / f"{name} trace.json"),
                MemoryReport.from_trace(folder / f"{name} trace-1.json"),
            ),
            ((folder / f"{name}-0.txt").read_text(), (folder / f"{name}-1.txt").read_text()),
        )
        for name in CASES
    }


@pytest.mark.slow  # each process imports torch and Lightning anew
@pytest.mark.parametrize("name", CASES)
def test_every_byte_of_every_rank_has_its_name(name: str, ranks: dict[str, Ranks]) -> None:
    assert ranks[name].replayed == ranks[name].reports
    for report in ranks[name].reports:
        assert sum(report.categories.values()) == report.peak_bytes
        assert report.categories[Category.UNATTRIBUTED] <= 0.01 * report.peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_buckets_of_ddp_are_gradients(name: str, ranks: dict[str, Ranks]) -> None:
    for report in ranks[name].reports:
        gradients = report.phases["optimizer_step"].categories[GRADIENTS]
        assert gradients == CASES[name].bytes_per_parameter * report.parameters
        size = (2 if CASES[name].half else 4) * report.parameters  # they are few: one bucket has room for all
        assert [use.module for use in report.tensors if use.category == GRADIENTS and use.bytes == size] == [None]
        assert ("second copy of the gradients" in " ".join(report.notes)) == (not CASES[name].views)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_first_prints_the_worst(name: str, ranks: dict[str, Ranks]) -> None:
    (first, second), (printed, silent) = ranks[name].reports, ranks[name].printed
    assert first.categories[Category.WEIGHTS] == second.categories[Category.WEIGHTS]
    assert second.peak_bytes > first.peak_bytes
    assert "Of 2 processes, that of rank 1 has the highest peak:" in printed
    assert printed.count("phase peaks") == 1
    assert f"{second.peak_bytes / 2**20:.2f} MiB" in printed or f"{second.peak_bytes / 2**10:.2f} KiB" in printed
    assert silent == ""
