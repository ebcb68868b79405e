"""The profiler over the real plugin: masters, moments and activations by name, and next to nothing without one."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from examples.train_gpt import ByteText, GPTModule
from lightning_mpt import MasterWeightPrecision
from lightning_mpt.profiler import Category, MemoryProfiler, MemoryReport

UNATTRIBUTED = 0.01
"""The most of a peak that may go without a name. Seen: under 0.0001."""
FP32 = "32-true"
MASTER_BYTES = {"split": 2, "float32": 4}


class GPT2(L.LightningModule):
    """transformers' GPT-2, small, with fresh weights."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        shape: dict[str, Any] = {"n_layer": 2, "n_embd": 128, "n_head": 2, "vocab_size": 256, "n_positions": 128}
        self.model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0, use_cache=False)).train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters())


def gpt2() -> tuple[L.LightningModule, Any]:
    tokens = torch.randint(256, (24, 128), generator=torch.Generator().manual_seed(0))
    return GPT2(), DataLoader(TensorDataset(tokens), batch_size=4)


def example() -> tuple[L.LightningModule, Any]:
    return GPTModule("nano", seq_len=64, steps=6), ByteText(seq_len=64, batch_size=4, steps=6)


MODELS = {"gpt2": gpt2, "example": example}


def profile(model: str, precision: str, tmp_path: Any, **options: Any) -> tuple[MemoryReport, int]:
    """The report of a short fit, and the number of parameters."""
    torch.manual_seed(0)
    module, data = MODELS[model]()
    ours = precision != FP32
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        profiler=MemoryProfiler(tmp_path, warmup_steps=2, steps=2),
        plugins=[MasterWeightPrecision(precision, **options)] if ours else None,  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return trainer.profiler.report, sum(parameter.numel() for parameter in module.parameters())  # type: ignore[attr-defined]


@pytest.mark.parametrize("precision", [FP32, "bf16-true", "16-true"])
@pytest.mark.parametrize("model", MODELS)
def test_every_byte_has_a_name_and_they_sum_to_the_peak(model: str, precision: str, tmp_path: Any) -> None:
    report, _ = profile(model, precision, tmp_path)
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.categories.get(Category.UNATTRIBUTED, 0) <= UNATTRIBUTED * report.peak_bytes
    assert set(report.phases) == {"forward", "backward", "optimizer_step"}
    for phase in report.phases.values():
        assert sum(phase.categories.values()) == phase.peak_bytes
        assert phase.categories.get(Category.UNATTRIBUTED, 0) <= UNATTRIBUTED * phase.peak_bytes


@pytest.mark.parametrize("master_weights", MASTER_BYTES)
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("model", MODELS)
def test_masters_and_moments_are_told_apart(model: str, precision: str, master_weights: str, tmp_path: Any) -> None:
    report, parameters = profile(model, precision, tmp_path, master_weights=master_weights)
    step = report.phases["optimizer_step"].categories
    for categories in (report.categories, step):
        assert categories[Category.WEIGHTS] == 2 * parameters
        assert categories[Category.MASTER_WEIGHTS] == MASTER_BYTES[master_weights] * parameters
        moments = categories[Category.OPTIMIZER_STATE]
        assert 8 * parameters <= moments < 8 * parameters + 4096  # step counts and the like
    assert step[Category.GRADIENTS] == 2 * parameters


def test_activations_are_half_and_fp32_has_no_masters(tmp_path: Any) -> None:
    full, parameters = profile("gpt2", FP32, tmp_path)
    half, _ = profile("gpt2", "bf16-true", tmp_path)
    assert full.categories.get(Category.MASTER_WEIGHTS, 0) == 0
    assert full.phases["optimizer_step"].categories[Category.GRADIENTS] == 4 * parameters
    assert half.categories[Category.ACTIVATIONS] < 0.6 * full.categories[Category.ACTIVATIONS]  # the loss is FP32
