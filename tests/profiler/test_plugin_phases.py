"""The profiler over the plugin in both halves, and over FP32: every phase's peak is named to the byte."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from examples.train_gpt import ByteText, GPTModule
from lightning_mpt import MasterWeightPrecision
from lightning_mpt.profiler import Category, MemoryProfiler

UNATTRIBUTED = 0.01
"""The most of a peak that may go without a name. Seen: under 0.0001."""


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


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "16-true"])
@pytest.mark.parametrize("build", [gpt2, example])
def test_the_bytes_of_every_phase_are_named(build: Any, precision: str, tmp_path: Any) -> None:
    torch.manual_seed(0)
    module, data = build()
    profiler = MemoryProfiler(tmp_path, warmup_steps=2, steps=2)
    L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        profiler=profiler,
        plugins=None if precision == "32-true" else [MasterWeightPrecision(precision)],  # type: ignore[arg-type]
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, data)
    report = profiler.report
    assert list(report.phases) == ["forward", "backward", "clip", "optimizer_step"]
    for part in (report, *report.phases.values()):
        assert sum(part.categories.values()) == part.peak_bytes
        assert part.categories.get(Category.UNATTRIBUTED, 0) <= UNATTRIBUTED * part.peak_bytes
    count = sum(parameter.numel() for parameter in module.parameters())
    step = report.phases["optimizer_step"].categories
    item = 4 if precision == "32-true" else 2
    assert step[Category.WEIGHTS] == step[Category.GRADIENTS] == item * count
    assert step.get(Category.MASTER_WEIGHTS, 0) == (0 if precision == "32-true" else 2 * count)
    assert 8 * count <= step[Category.OPTIMIZER_STATE] < 8 * count + 4096  # and the step counts
