"""The throughput benchmark: what it counts, and that one contender without memory leaves the others."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import numbers, throughput
from benchmarks.common import MISSED
from benchmarks.step_clock import StepClock
from benchmarks.throughput import Contest, Network

TINY = Network("gpt2", {"layers": 1, "width": 64, "vocab_size": 32, "seq_len": 8}, 2, rounds=2, steps=3, goal=1.0)


@pytest.fixture(autouse=True)
def _uncollected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A walk over all that pytest holds takes longer than a turn."""
    monkeypatch.setattr("gc.collect", lambda: 0)


@pytest.mark.parametrize("precision", throughput.CONTENDERS["cpu"])
def test_every_contender_takes_every_step(precision: str) -> None:
    found = throughput.train(TINY, precision, "cpu", steps=3)
    assert len(found["seconds"]) == 3
    assert min(found["seconds"]) > 0
    assert found["skipped_steps"] == 0


@pytest.mark.parametrize("precision", ["mpt-16-true", "mpt-bf16-true:compact"])
def test_a_step_that_is_skipped_is_told(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflowing(throughput.Step):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (float("inf") if batch_idx == 1 else 1)

    monkeypatch.setattr(throughput, "Step", Overflowing)
    assert throughput.train(TINY, precision, "cpu", steps=3)["skipped_steps"] == 1


def test_a_step_lasts_from_the_end_of_the_step_before(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = type("Trainer", (), {"strategy": type("Strategy", (), {"root_device": torch.device("cpu")})})
    ends = iter([10.0, 10.5, 12.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(ends))
    clock = StepClock()
    for _ in range(3):
        clock.on_train_batch_end(trainer)  # type: ignore[arg-type]
    assert clock.seconds() == [0.5, 1.5]


def made(seconds: dict[str, float]) -> Any:
    """A `train` that takes what it is told, and has no memory for a precision that is not told of."""

    def train(network: Network, precision: str, device: str, steps: int) -> dict[str, Any]:
        if precision not in seconds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        taken = [seconds[precision]] * steps
        return {"library": "transformers", "parameters": 7, "seconds": taken, "skipped_steps": 0}

    return train


def test_contenders_take_turns_and_one_without_memory_is_a_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "train", made({"bf16-mixed": 0.5, "mpt-bf16-true": 0.25}))
    contest = Contest(TINY, "cpu")
    turns = list(contest.run())
    assert turns == [*throughput.CONTENDERS["cpu"]] * 2
    assert len(turns) == len(contest)
    result = contest.result()
    rows = {row["precision"]: row for row in result["rows"]}
    assert rows["32-true"] == {"precision": "32-true", "status": "out of memory"}
    assert rows["mpt-bf16-true"]["steps_per_s"] == 4
    assert rows["mpt-bf16-true"]["units_per_s"] == 4 * 2 * 8
    assert rows["mpt-bf16-true"]["rounds"] == 2 * 3
    assert rows["mpt-bf16-true"]["times_the_reference"] == 2
    assert result["goal_met"] is True


def test_a_goal_that_is_missed_or_not_reached_for_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, met in (
        ({"bf16-mixed": 0.5, "mpt-bf16-true": 0.51}, False),
        ({"bf16-mixed": 0.5}, None),
        ({"mpt-bf16-true": 0.5}, None),
    ):
        monkeypatch.setattr(throughput, "train", made(seconds))
        contest = Contest(TINY, "cpu", quick=True)
        list(contest.run())
        assert contest.result()["goal_met"] is met


def test_networks_measured_one_by_one_are_in_one_file_and_on_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(throughput, "NETWORKS", {"cpu": {"A": TINY, "B B": TINY._replace(goal=None)}})
    out = tmp_path / "throughput_cpu.json"
    arguments = ["--accelerator", "cpu", "--out", str(out), "--network"]
    monkeypatch.setattr(throughput, "train", made({"bf16-mixed": 0.5, "mpt-bf16-true": 0.4, "32-true": 1.0}))
    assert throughput.main([*arguments, "B B"]) == 0
    assert json.loads(out.read_text())["environment"]["command"].endswith('--accelerator cpu --network "B B"')
    monkeypatch.setattr(throughput, "train", made({"bf16-mixed": 0.5, "mpt-bf16-true": 0.8}))
    assert throughput.main([*arguments, "A"]) == MISSED
    result = json.loads(out.read_text())
    assert list(result["networks"]) == ["A", "B B"]
    assert result["environment"]["command"].endswith("--accelerator cpu")
    lines = numbers.number("throughput", tmp_path).splitlines()
    assert "| A | `mpt-bf16-true` | 800.0 (800.0 to 800.0) | 1.25 | 20 tokens | 0.62 | 1 |" in lines
    assert "| A | `32-true` | out of memory |  |  |  |  |" in lines
    assert "| B B | `32-true` | 1000.0 (1000.0 to 1000.0) | 1.00 | 16 tokens | 0.50 |  |" in lines


def test_an_unknown_network_is_refused_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        throughput.main(["--accelerator", "cpu", "--network", "LSTM"])
    assert "'LSTM' is not one of 'GPT-2', 'ResNet'" in capsys.readouterr().err


def test_resnet_50_has_its_size() -> None:
    with torch.device("meta"):
        module, _ = throughput.built(throughput.NETWORKS["cuda"]["ResNet-50"])
    assert sum(parameter.numel() for parameter in module.parameters()) == 25_557_032
