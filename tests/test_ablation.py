"""The ablations: each takes away what it says and no more, and all of them can be run."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor
from training import Classifier, classification, fit, mlp

from benchmarks import ablation
from benchmarks.half_products import HalfProducts
from benchmarks.half_sums import HalfSums
from lightning_mpt import MasterWeightPrecision

DTYPES = [torch.float16, torch.bfloat16]


def operands(dtype: torch.dtype, depth: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(3, *s, generator=generator).to(dtype) for s in ((5, depth), (depth, 7)))  # type: ignore


def test_sums_are_rounded_to_half_at_every_chunk() -> None:
    a, b = operands(torch.float16, 50)
    total = np.zeros((3, 5, 7), np.float16)
    for start in range(0, 50, 16):
        wide = a.numpy()[..., start : start + 16].astype(np.float32) @ b.numpy()[:, start : start + 16].astype(
            np.float32
        )
        total = total + wide.astype(np.float16)  # numpy rounds a sum of halves to half
    with HalfSums(16):
        assert np.array_equal(torch.bmm(a, b).numpy(), total)
        assert np.array_equal(torch.mm(a[0], b[0]).numpy(), total[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_chunk_is_the_product_summed_in_fp32(dtype: torch.dtype) -> None:
    a, b = operands(dtype, 40)
    bias = torch.randn(7).to(dtype)
    with HalfProducts():
        expected = torch.bmm(a, b)
    with HalfSums(40):
        assert torch.equal(torch.bmm(a, b), expected)
        assert torch.equal(torch.addmm(bias, a[0], b[0]), (bias.float() + expected[0].float()).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_long_sum_in_half_stalls(dtype: torch.dtype) -> None:
    """Ones, 16 at a time: from 32 * 2**(significant bits - 1) on, another 16 is half a unit in the last place."""
    ones = torch.ones(1, 2**17, dtype=dtype)
    stall = {torch.float16: 2.0**15, torch.bfloat16: 2.0**12}[dtype]
    with HalfSums(16):
        assert torch.mm(ones, ones.t()).item() == stall


class KeptMasters(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        plugin = trainer.precision_plugin
        assert isinstance(plugin, MasterWeightPrecision)
        self.pairs = list(zip(module.parameters(), plugin.master_params(trainer.optimizers[0]), strict=True))
        self.same = all(torch.equal(half.float(), master) for half, master in self.pairs)


@pytest.mark.parametrize("masters", [True, False])
@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_without_masters_nothing_is_kept_that_half_cannot_hold(precision: Any, masters: bool) -> None:
    plugin = MasterWeightPrecision(precision, master_weights="float32")
    updates, kept = ablation.Updates(1, masters=masters), KeptMasters()
    fit(Classifier(mlp()), classification(4), plugin, callbacks=[updates, kept])
    assert kept.same is not masters
    assert 0 < updates.vanished < updates.updates
    if not masters:  # a master is seldom a half number, and may cross to the next with any update
        assert updates.vanished <= updates.small < updates.updates


def test_every_case_runs_and_what_is_done_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = torch.arange(4000, dtype=torch.int64).mul(7919).remainder(251).to(torch.uint8)
    monkeypatch.setattr(ablation, "texts", lambda: (text, text))
    monkeypatch.setattr(ablation, "VALIDATION_BATCHES", 1)
    monkeypatch.setattr(ablation, "BATCH_SIZE", 2)
    out = tmp_path / "ablation.json"
    arguments = ["--quick", "--steps", "2", "--out", str(out), "--images", str(tmp_path)]
    assert ablation.main(arguments) == 0
    result = json.loads(out.read_text())
    assert [run["case"] for run in result["runs"]] == [case.name for case in ablation.CASES]
    assert [row["case"] for row in result["summary"]] == [case.name for case in ablation.CASES]
    flushed = {row["case"]: row["zero_activation_gradients"] for row in result["summary"]}
    assert flushed["fp16, no loss scale"] > flushed["fp16, scale 32768"]
    for picture in ("ablation.png", "gradient_exponents.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(ablation, "train", None)
    assert ablation.main(arguments) == 0


def row(case: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    (found,) = [one for one in ablation.summary(runs) if one["case"] == case]
    return found


def test_an_ablation_shows_where_it_costs_more_than_a_complete_run_differs() -> None:
    def run(case: str, seed: int, loss: float) -> dict[str, Any]:
        gradients = {kind: {"zero": 0.0} for kind in ("weights", "activations")}
        counts = {"gradients": gradients, "vanished_updates": None, "skipped_steps": 0}
        return {"case": case, "seed": seed, "loss": loss, **counts}

    runs = [run("FP32", 0, 2.0), run("FP32", 1, 2.5), run("fp16", 0, 1.98), run("bf16", 1, 2.51)]
    runs += [run("fp16, no masters", 0, 2.03), run("fp16, no masters", 1, 2.54)]
    runs += [run("bf16, no masters", 0, 2.01), run("bf16, no masters", 1, 2.51)]
    assert row("fp16, no masters", runs)["shows"] is True
    assert row("fp16, no masters", runs)["above_fp32"] == pytest.approx(0.035)
    assert row("bf16, no masters", runs)["shows"] is False
    assert row("fp16", runs)["shows"] is None
