"""The profiler on the plugin: masters and moments are told apart, nothing is left without a name, halves are half."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

from examples.train_gpt import ByteText, GPTModule
from lightning_mpt import MasterWeightPrecision
from lightning_mpt.profiler import Category, MemoryProfiler, MemoryReport

UNATTRIBUTED = 0.01


class GPT2(L.LightningModule):
    def __init__(self, optimizer: Any = torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(0)
        self._optimizer = optimizer
        self.net = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=64, n_positions=256, n_embd=128, n_layer=4, n_head=4, bos_token_id=None, eos_token_id=None,
                resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
            )
        ).train()  # fmt: skip

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        return self.net(input_ids=batch[0], labels=batch[0]).loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self._optimizer(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> Any:
        ids = torch.randint(64, (48, 256), generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(ids), batch_size=8)


def report_of(module: L.LightningModule, path: Path, data: Any = None, **options: Any) -> MemoryReport:
    profiler = MemoryProfiler(dirpath=path, warmup_steps=1, steps=2)
    trainer = L.Trainer(
        accelerator="cpu", max_steps=3, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, profiler=profiler, limit_val_batches=0, **options,
    )  # fmt: skip
    trainer.fit(module, data)
    return profiler.report


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, MemoryReport]:
    """GPT-2 in bf16 under both exact kinds of masters."""
    path = tmp_path_factory.mktemp("ours")
    return {
        masters: report_of(GPT2(), path, plugins=[MasterWeightPrecision("bf16-true", master_weights=masters)])
        for masters in ("split", "float32")
    }


@pytest.mark.parametrize(("master_weights", "bytes_per_master"), [("split", 2), ("float32", 4)])
def test_every_byte_of_gpt2_has_its_category(
    ours: dict[str, MemoryReport], master_weights: str, bytes_per_master: int
) -> None:
    module, report = GPT2(), ours[master_weights]
    count, tensors = (sum(f(p) for p in module.parameters()) for f in (torch.Tensor.numel, lambda _: 1))
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.categories["unattributed"] <= UNATTRIBUTED * report.peak_bytes
    assert report.categories["weights"] == 2 * count
    assert report.categories["master_weights"] == bytes_per_master * count
    assert report.categories["optimizer_state"] == 8 * count + 4 * tensors  # and a step count each
    assert report.phases["optimizer_step"].categories["gradients"] == 2 * count


def test_every_byte_of_the_example_has_its_category(tmp_path: Path) -> None:
    module = GPTModule("tiny", seq_len=64, lr=1e-3, steps=6, warmup_steps=1)
    data = ByteText(seq_len=64, batch_size=4, steps=6)
    report = report_of(module, tmp_path, data, plugins=[MasterWeightPrecision("bf16-true")])
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.categories["unattributed"] <= UNATTRIBUTED * report.peak_bytes
    assert report.categories["activations"] > 0


def test_what_is_saved_for_backward_is_no_more_than_under_lightnings_bf16_true(
    ours: dict[str, MemoryReport], tmp_path: Path
) -> None:
    theirs = report_of(GPT2(), tmp_path, precision="bf16-true")
    loss_bytes = 4  # one FP32 number
    assert ours["split"].categories["activations"] <= theirs.categories["activations"] + loss_bytes


def test_the_peak_is_what_arithmetic_allows_and_below_autocasts(ours: dict[str, MemoryReport], tmp_path: Path) -> None:
    module = GPT2()
    state = 16 * sum(parameter.numel() for parameter in module.parameters())
    fp32 = report_of(module, tmp_path)
    mixed = report_of(GPT2(), tmp_path, precision="bf16-mixed")
    peak_bytes = ours["split"].peak_bytes
    allowed = (fp32.categories["activations"] / 2 + state * 14 / 16) / fp32.peak_bytes + 0.04  # 0.54 here
    assert peak_bytes / fp32.peak_bytes <= allowed
    assert peak_bytes < mixed.peak_bytes


def test_masters_of_any_other_optimizer_are_named_too(tmp_path: Path) -> None:
    def momentum(params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=lr, momentum=0.9)

    module = GPT2(momentum)
    report = report_of(module, tmp_path, plugins=[MasterWeightPrecision("bf16-true")])
    count = sum(parameter.numel() for parameter in module.parameters())
    assert report.categories["master_weights"] == 4 * count
    assert report.categories["optimizer_state"] == 4 * count
    by_module = {path: own.get(Category.OPTIMIZER_STATE, 0) for path, own in report.modules.items()}
    assert sum(by_module.values()) == 4 * count
    assert by_module["net.transformer.h.0.mlp.c_fc"] == 4 * (128 * 512 + 512)
    assert report.phases["optimizer_step"].categories["gradients"] >= 2 * count
    assert report.categories["unattributed"] <= UNATTRIBUTED * report.peak_bytes
