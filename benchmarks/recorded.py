"""A training step of any network, and what the profiler says of it."""

import tempfile
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import SILENT
from examples.train_gpt import quiet_lightning
from lightning_mpt.precisions import trainer_arguments
from lightning_mpt.profiler import MemoryProfiler, MemoryReport


class Step(L.LightningModule):
    """A network under AdamW: its own loss where it computes one, else cross entropy.

    Of several outputs the further ones are auxiliary heads, with 0.3 of the loss each.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net.train()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if isinstance(batch, dict):
            return self.net(**batch).loss
        inputs, targets = batch
        outputs = self.net(inputs)
        if isinstance(outputs, Tensor):
            return F.cross_entropy(outputs, targets)
        main, *auxiliary = (F.cross_entropy(output, targets) for output in outputs)
        return main + 0.3 * sum(auxiliary)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


class Repeated:
    """The same batch again and again, in new memory each time."""

    def __init__(self, batch: Any, count: int) -> None:
        self._batch = batch
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Any]:
        for _ in range(self._count):
            if isinstance(self._batch, dict):
                yield {name: tensor.clone() for name, tensor in self._batch.items()}
            else:
                yield [tensor.clone() for tensor in self._batch]


def recorded(module: L.LightningModule, batches: Any, precision: str, accelerator: str) -> MemoryReport:
    """Train two steps in this process, of which the second is recorded, and give the profiler's report."""
    quiet_lightning()
    profiler = MemoryProfiler(tempfile.mkdtemp(), warmup_steps=1, steps=1)
    arguments = {**SILENT, **trainer_arguments(precision)}
    trainer = L.Trainer(accelerator=accelerator, devices=1, max_steps=2, profiler=profiler, **arguments)
    trainer.fit(module, batches)
    return profiler.report


def by_category(report: MemoryReport) -> dict[str, int]:
    """The categories at the peak, as JSON has them."""
    return {str(category): size for category, size in report.categories.items()}
