"""Modules, data and trainers that the tests of the plugin share."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_mpt import MasterWeightPrecision

Configure = Callable[[L.LightningModule], Any]


def adamw(lr: float = 1e-2, **options: Any) -> Configure:
    return lambda module: torch.optim.AdamW(module.parameters(), lr=lr, **options)


class Classifier(L.LightningModule):
    """A network, cross entropy, and whatever optimizer it is given. Keeps every loss."""

    def __init__(self, net: nn.Module, configure: Configure | None = None) -> None:
        super().__init__()
        self.net = net
        self._configure = configure or adamw()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return self._configure(self)


class Validated(Classifier):
    """The same, with a validation loss."""

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))


class Sized(Classifier):
    """With a batch size for the Tuner to find: memory runs out above 16. An epoch has 64 samples."""

    batch_size = 2

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        x, y = classification(1, size=64)[0]
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor | None:
        if len(batch[0]) > 16:
            raise RuntimeError("CUDA out of memory.")
        return super().training_step(batch, batch_idx)


class Batches(Dataset[tuple[Tensor, ...]]):
    """Batches that are what they are: a dataset whose items are whole batches."""

    def __init__(self, batches: Sequence[tuple[Tensor, ...]]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return self._batches[index]


class Resumable:
    """A loader that a checkpoint remembers, so that a run goes on in the middle of an epoch."""

    def __init__(self, batches: Sequence[tuple[Tensor, ...]]) -> None:
        self._batches, self._next = batches, 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        self._next %= len(self)
        while self._next < len(self):
            self._next += 1
            yield self._batches[self._next - 1]

    def state_dict(self) -> dict[str, int]:
        return {"next": self._next}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._next = state_dict["next"]


def classification(count: int, *, size: int = 32) -> list[tuple[Tensor, ...]]:
    """`count` batches of a task that can be learned: which of the first 4 of 16 features is the largest."""
    generator = torch.Generator().manual_seed(1)
    batches: list[tuple[Tensor, ...]] = []
    for _ in range(count):
        x = torch.randn(size, 16, generator=generator)
        batches.append((x, x[:, :4].argmax(dim=1)))
    return batches


def loader(batches: Sequence[tuple[Tensor, ...]]) -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(Batches(batches), batch_size=None)


def mlp(*, features: int = 16, width: int = 64, classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, classes)
    )


def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.LayerNorm(128), nn.Linear(128, 4),
    )  # fmt: skip


def trainer(plugin: MasterWeightPrecision | None = None, **options: Any) -> L.Trainer:
    """A silent Trainer on the CPU, for one epoch if nothing else is said."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    if plugin is not None:
        defaults["plugins"] = [plugin]
    return L.Trainer(**{**defaults, **options})


def fit(
    module: L.LightningModule,
    batches: Sequence[tuple[Tensor, ...]],
    plugin: MasterWeightPrecision | None = None,
    **options: Any,
) -> L.Trainer:
    """Train `module` on `batches` and give the Trainer that did."""
    ours = trainer(plugin, **options)
    ours.fit(module, loader(batches))
    return ours


class TiedGPT2(L.LightningModule):
    """transformers' GPT-2, without dropout: its head is its embedding, and its loss brings the logits to FP32.

    Args:
        shape: what a small one of its configuration is to be, where it is not this one.
    """

    def __init__(self, **shape: int) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        super().__init__()
        torch.manual_seed(0)
        small: dict[str, Any] = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 64, "n_positions": 32, **shape}
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        self.net = GPT2LMHeadModel(GPT2Config(**small, **none, bos_token_id=None, eos_token_id=None)).train()
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=batch[0], labels=batch[0]).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)
