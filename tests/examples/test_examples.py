"""Both examples, from their command lines, at the smallest size: they train, and print what they promise."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from examples import train_digits, train_gpt

SMALLEST = ["--accelerator", "cpu", "--size", "nano", "--steps", "6", "--batch-size", "4", "--seq-len", "32"]


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, where the report is written; on few threads, since small tensors on many are slow."""
    monkeypatch.chdir(tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(min(2, before))
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["mpt-bf16-true", "32-true"])
def test_gpt_trains_and_ends_with_its_loss_and_the_memory_table(
    precision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    loss = train_gpt.main([*SMALLEST, "--precision", precision])
    printed = capsys.readouterr().out
    assert 0.0 < loss < math.log(256) + 0.1  # no worse than knowing nothing
    assert f"validation loss {loss:.4f}" in printed
    assert "activations" in printed
    assert "bytes per parameter" in printed


def test_gpt_passes_its_options_on_to_the_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    split = train_gpt.main([*SMALLEST, "--master-weights", "split"])
    options = ["--master-weights", "float32", "--loss-scale", "1024"]
    assert train_gpt.main([*SMALLEST, *options]) == pytest.approx(split, rel=1e-3)
    with pytest.raises(ValueError, match="float16"):
        train_gpt.main([*SMALLEST, "--master-weights", "float16"])


def test_gpt_repeats_itself_from_one_seed(capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (train_gpt.main([*SMALLEST, "--seed", seed]) for seed in ("3", "3", "4"))
    assert first == again
    assert first != other


@pytest.mark.parametrize("text", ["sometimes", "1e"])
def test_a_loss_scale_that_is_none_is_refused_by_name(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_gpt.main(["--loss-scale", text])
    assert repr(text) in capsys.readouterr().err


def test_an_option_of_ours_beside_another_precision_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train_gpt.main(["--precision", "32-true", "--master-weights", "float32"])
    assert "--master-weights is for the mpt- precisions and means nothing to 32-true" in capsys.readouterr().err


def test_text_is_split_by_file_and_the_same_every_time() -> None:
    train, validation = train_gpt.read_standard_library()
    again, _ = train_gpt.read_standard_library()
    assert train.dtype == torch.uint8
    assert torch.equal(train, again)
    assert 0.01 < len(validation) / len(train) < 0.2
    windows = train_gpt.Windows(train, count=3, seq_len=16, seed=0)
    inputs, targets = windows[2]
    assert torch.equal(inputs[1:], targets[:-1])


def test_learning_rate_warms_up_and_falls_to_a_tenth() -> None:
    factors = [train_gpt.lr_factor(step, warmup_steps=5, steps=50) for step in range(51)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert factors[50] == pytest.approx(0.1)


def test_digits_reach_the_accuracy_of_fp32(capsys: pytest.CaptureFixture[str]) -> None:
    full, ours = train_digits.main(["--accelerator", "cpu", "--compare", "--epochs", "5", "--width", "16"])
    assert (full.precision, ours.precision) == ("32-true", "mpt-bf16-true")
    assert full.accuracy > 0.95
    assert ours.accuracy > full.accuracy - 0.015  # of 360 images; the last percent moves with the seed
    assert "test accuracy" in capsys.readouterr().out
