"""Does it train as well: the tasks train what they say, and the verdict is what the figures say."""

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import scipy.linalg
import torch
from rich.console import Console
from torch import Tensor

from benchmarks import accuracy, numbers
from benchmarks.gan import frechet_distance
from benchmarks.tasks import MINIMAL, REFERENCE, TASKS, UNCLIPPED
from lightning_mpt.precisions import LIGHTNING, NAMES


@pytest.fixture(scope="module", autouse=True)
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(accuracy, "workers", lambda jobs, threads: ThreadPoolExecutor(1))
        yield


TRAINED = (REFERENCE, "bf16-mixed", "mpt-16-true", "mpt-bf16-true:compact", UNCLIPPED, MINIMAL)


@pytest.fixture(scope="module")
def quick(in_this_process: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of every task under most precisions that a CPU has, one step each."""
    out = tmp_path_factory.mktemp("accuracy") / "accuracy.json"
    arguments = ["--quick", "--steps", "1", "--accelerator", "cpu", "--out", str(out), "--precision", *TRAINED]
    assert accuracy.main(arguments) == 0
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def test_every_task_trains_under_every_precision(quick: dict[str, Any]) -> None:
    """After one step near FP32, and not the same."""
    for name, task in TASKS.items():
        figures = {run["precision"]: run["figure"] for run in quick["runs"] if run["task"] == name}
        assert set(figures) == set(TRAINED) & set(task.precisions("cpu"))
        assert all(figure == pytest.approx(figures[REFERENCE], rel=1e-2) for figure in figures.values()), name
        assert figures["bf16-mixed"] != figures[REFERENCE] != figures["mpt-bf16-true:compact"], name


def test_one_seed_gives_no_verdict(quick: dict[str, Any]) -> None:
    assert {row["verdict"] for task in quick["summary"] for row in task["rows"]} == {None}


def test_on_a_gpu_lightnings_other_precisions_are_there_too() -> None:
    for task in TASKS.values():
        names = {name.removesuffix(", unclipped") for name in task.precisions("cuda")}
        assert set(LIGHTNING) <= names <= set(NAMES)
        assert set(task.precisions("cuda")) - set(task.precisions("cpu")) == {"16-mixed", "16-true"}


@pytest.mark.parametrize("task", ["gan", "digits"])
def test_a_task_learns_and_a_seed_is_a_run(task: str) -> None:
    """What a process trained before does not matter."""
    first, learned, again = (
        TASKS[task].run("mpt-bf16-true", seed, steps, "cpu") for seed, steps in ((0, 1), (0, 25), (0, 1))
    )
    assert first is not None
    assert learned is not None
    assert learned < 0.95 * first
    assert again == first
    assert TASKS[task].run("mpt-bf16-true", 1, 1, "cpu") != first


def run(precision: str, seed: int, figure: float | None, task: str = "gpt") -> dict[str, Any]:
    return {"task": task, "precision": precision, "seed": seed, "steps": 5, "figure": figure}


FP32 = [run(REFERENCE, 0, 2.0), run(REFERENCE, 1, 2.5)]


@pytest.mark.parametrize(
    ("figures", "verdict", "difference"),
    [
        ((2.1, 2.6), "inside", 0.1),
        ((2.0, 2.0), "inside", -0.25),
        ((2.4, 2.61), "worse", 0.255),
        ((1.9, 2.09), "better", -0.255),
        ((2.1, None), "diverged", None),
    ],
)
def test_the_verdict_holds_the_mean_against_the_spread_of_fp32(
    figures: tuple[float | None, ...], verdict: str, difference: float | None
) -> None:
    ours = [run("mpt-bf16-true", seed, figure) for seed, figure in enumerate(figures)]
    (table,) = accuracy.summary(FP32 + ours, "cpu")
    assert [row["verdict"] for row in table["rows"]] == [None, verdict]
    assert table["rows"][1]["mean_difference"] == (difference and pytest.approx(difference))


def test_minimal_is_held_against_fp32_as_it_is_clipped() -> None:
    unclipped = [run(UNCLIPPED, 0, 3.0), run(UNCLIPPED, 1, 3.5)]
    minimal = [run(MINIMAL, 0, 3.1), run(MINIMAL, 1, 3.2)]
    (table,) = accuracy.summary(FP32 + unclipped + minimal, "cpu")
    assert table["rows"][-1]["verdict"] == "inside"
    digits = [{**one, "task": "digits"} for one in FP32 + minimal]
    (table,) = accuracy.summary(digits, "cpu")
    assert table["rows"][-1]["verdict"] == "worse"


def test_what_is_done_is_not_run_again_unless_it_was_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[str, int, int]] = []

    def counted(task: str, precision: str, seed: int, steps: int, accelerator: str) -> dict[str, Any]:
        ran.append((precision, seed, steps))
        return {"task": task, "precision": precision, "seed": seed, "steps": steps, "figure": 1.0}

    monkeypatch.setattr(accuracy, "run", counted)
    monkeypatch.setenv("LIGHTNING_MPT_COMMIT", "a")
    out = tmp_path / "accuracy.json"
    arguments = ["--task", "gan", "--precision", REFERENCE, "mpt-16-true", "--accelerator", "cpu", "--out", str(out)]
    assert accuracy.main([*arguments, "--seeds", "1", "--steps", "7"]) == 0
    assert ran == [(REFERENCE, 0, 7), ("mpt-16-true", 0, 7)]
    ran.clear()
    assert accuracy.main([*arguments, "--seeds", "2", "--steps", "7"]) == 0
    assert ran == [(REFERENCE, 1, 7), ("mpt-16-true", 1, 7)]
    ran.clear()
    accuracy.main([*arguments, "--seeds", "2", "--steps", "8"])
    assert len(ran) == 4
    monkeypatch.setenv("LIGHTNING_MPT_COMMIT", "b")
    accuracy.main([*arguments, "--seeds", "2", "--steps", "8"])
    assert len(ran) == 8


def test_the_tables_fit_a_narrow_terminal(quick: dict[str, Any]) -> None:
    console = Console(width=60, record=True)
    accuracy.show(quick["summary"], console)
    text = console.export_text()
    assert text.count("mpt-bf16-true:compact") == len(TASKS)
    assert "…" not in text


def test_the_numbers_are_made_of_it(quick: dict[str, Any]) -> None:
    """Of the runs that there are, and of one that diverged."""
    assert all(f"`{name}`: " in numbers.accuracy(quick) for name in TASKS)
    quick = {**quick, "summary": accuracy.summary([*FP32, run("bf16-true", 0, None)], "cpu")}
    told = numbers.accuracy(quick)
    assert "`bf16-true` 1 of 1" in told
    assert "| `bf16-true` |  |  |  | diverged |" in told


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(500, 6, generator=generator, dtype=torch.float64)
    mixing = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    return one, torch.randn(400, 6, generator=generator, dtype=torch.float64) @ mixing + 1


def test_the_frechet_distance_is_what_a_matrix_root_gives() -> None:
    one, other = samples()
    c1, c2 = one.T.cov(), other.T.cov()
    root = torch.from_numpy(scipy.linalg.sqrtm((c1 @ c2).numpy()).real)
    expected = (one.mean(0) - other.mean(0)).square().sum() + (c1 + c2 - 2 * root).trace()
    assert frechet_distance(one, other) == pytest.approx(expected.item(), rel=1e-10)


def test_the_frechet_distance_of_a_moved_and_stretched_sample() -> None:
    one, _ = samples()
    deviations = one.var(0).sum().item()
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(one, one + 2) == pytest.approx(6 * 4)
    assert frechet_distance(one - one.mean(0), 3 * (one - one.mean(0))) == pytest.approx(4 * deviations)
    assert math.isnan(frechet_distance(one, one.clone().fill_(float("nan"))))
