"""Small networks and data of many kinds, named by class path in the tests of `Target` and `compare`."""

from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader, Dataset, IterableDataset


class Kind(Enum):
    PLAIN = "p"
    FANCY = "f"


class Tiny(pl.LightningModule):
    """Two linear layers. Everything else is inherited from it."""

    def __init__(self, width: int = 16, lr: float = 1e-3, *, bias: bool = True) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, width, bias=bias), nn.ReLU(), nn.Linear(width, 1))
        self.lr = lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss = self.net(batch).float().square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


class WithData(Tiny):
    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Samples(40), batch_size=4)


class ReadsANumber(WithData):
    """Its loss depends on where the largest element is."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return super().training_step(batch[int(batch.sum(1).argmax()) :], batch_idx)


class BuiltFromNumbers(WithData):
    """Its width is the value of a tensor."""

    def __init__(self) -> None:
        super().__init__(int(torch.linspace(8, 16, 3)[1]))


class OfFour(WithData):
    """A batch is of four samples."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return super().training_step(batch.view(4, 8), batch_idx)


class WrongShape(WithData):
    """A linear layer that does not fit."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        return super().training_step(batch[:, :3], batch_idx)


class OutOfMemoryAtBF16(WithData):
    """Where the plain half precision is used, memory runs out at the first step."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        if type(self.trainer.precision_plugin).__name__ == "HalfPrecision":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more lines")
        return super().training_step(batch, batch_idx)


class Manual(WithData):
    """Manual optimization with two optimizers, and metrics to a logger of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.net(batch).square().mean())
            optimizer.step()
        assert self.logger is not None
        self.logger.log_metrics({"step": batch_idx})

    def configure_optimizers(self) -> Any:
        return [torch.optim.AdamW(layer.parameters()) for layer in (self.net[0], self.net[2])]


class Plateau(WithData):
    """Its schedule asks for what only validation logs, at the end of the epoch."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = {"scheduler": ReduceLROnPlateau(optimizer), "monitor": "val_loss"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


class NeverSteps(WithData):
    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        return None


class Fails(WithData):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        raise RuntimeError("shapes do not fit\nsecond line")


class NoStep(pl.LightningModule):
    def configure_optimizers(self) -> None:
        return None


class Plain(nn.Module):
    pass


class Typed:
    """A constructor with one of every kind of argument, all required but the last ones."""

    def __init__(
        self,
        count: int,
        either: int | str,
        maybe: float | None,
        sizes: list[int],
        pair: tuple[int, float],
        table: dict[str, float],
        mode: Literal["fast", "slow", 3],
        kind: Kind,
        folder: Path,
        dtype: torch.dtype,
        names: Sequence[str] = (),
        implicit: int = None,  # type: ignore[assignment]  # noqa: RUF013  # the way it was once written
        untyped=7,
    ) -> None:
        self.given = dict(locals())


class Keywords(Tiny):
    """Passes on what it does not know."""

    def __init__(self, depth: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.depth = depth


class Samples(Dataset[Tensor]):
    def __init__(self, count: int = 40) -> None:
        self.samples = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Tensor:
        return self.samples[index]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(Samples())


class Batches:
    """No Dataset: gives batches as they are."""

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.randn(4, 8) for _ in range(20))


class Data(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader(Samples(), self.batch_size)


def make_tiny(width: int) -> Tiny:
    return Tiny(width)


def make_number() -> int:
    return 3


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels)


constant = 3
