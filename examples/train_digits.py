"""Train a convolutional network with BatchNorm on scikit-learn's digits, in half precision with FP32 master weights.

    python examples/train_digits.py                          # a few seconds on a CPU
    python examples/train_digits.py --precision 32-true      # the same run in FP32
    python examples/train_digits.py --compare                # both, same seed, side by side

BatchNorm's running statistics are sums over many batches, so the plugin keeps those layers in FP32 while convolutions
and activations are half. Nothing in the module says so: `DigitsModule` is ordinary PyTorch and Lightning.
"""

import argparse
import logging
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from lightning_mpt.precisions import NAMES, trainer_arguments


class Result(NamedTuple):
    """What one run came to."""

    precision: str
    accuracy: float
    seconds: float


class DigitsModule(L.LightningModule):
    """Three convolutions, each with BatchNorm, over 8 x 8 images of the ten digits."""

    def __init__(self, *, width: int = 32, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        channels = (1, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for incoming, outgoing in pairwise(channels):
            layers += [nn.Conv2d(incoming, outgoing, 3, padding=1, bias=False), nn.BatchNorm2d(outgoing), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classifier = nn.Linear(channels[-1], 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images).float(), labels)
        self.log("train_loss", loss)
        return loss

    def test_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self(images).argmax(dim=1) == labels).float().mean()
        self.log("test_accuracy", accuracy, batch_size=len(labels))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"])
        schedule = OneCycleLR(optimizer, self.hparams["lr"], total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Digits(L.LightningDataModule):
    """The 1797 images that scikit-learn carries, every fifth kept for testing."""

    def __init__(self, *, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16.0
        labels = torch.tensor(digits.target, dtype=torch.int64)
        tested = torch.arange(len(labels)) % 5 == 0
        self.train_set = TensorDataset(images[~tested], labels[~tested])
        self.test_set = TensorDataset(images[tested], labels[tested])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        # Its own generator: two precisions see the same batches in the same order.
        order = torch.Generator().manual_seed(self.hparams["seed"])
        return DataLoader(self.train_set, self.hparams["batch_size"], shuffle=True, generator=order)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test_set, batch_size=len(self.test_set))


def train(precision: str, *, epochs: int, width: int, seed: int, accelerator: str) -> Result:
    """Train from `seed` under `precision`, then test. The accuracy is a share of the test images, 0 to 1."""
    L.seed_everything(seed, verbose=False)
    module, data = DigitsModule(width=width), Digits(seed=seed)
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **trainer_arguments(precision),
    )
    start = time.perf_counter()
    trainer.fit(module, data)
    seconds = time.perf_counter() - start
    (metrics,) = trainer.test(module, data, verbose=False)
    return Result(precision, metrics["test_accuracy"], seconds)


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Train as the command line says and print the test accuracy of each run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = "default: mpt-bf16-true on CPU, mpt-16-true on a GPU"
    parser.add_argument("--precision", choices=NAMES, metavar="NAME", help=default)
    parser.add_argument("--compare", action="store_true", help="run 32-true as well, from the same seed")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--width", type=int, default=32, help="channels of the first convolution")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(argv)
    if arguments.accelerator == "auto":
        arguments.accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    precision = arguments.precision or ("mpt-16-true" if arguments.accelerator == "cuda" else "mpt-bf16-true")

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message="The number of training batches .* is smaller than the logging interval")
    console = Console()
    results = []
    for name in dict.fromkeys(["32-true", precision] if arguments.compare else [precision]):
        with console.status(f"training under {name}"):
            results.append(
                train(
                    name,
                    epochs=arguments.epochs,
                    width=arguments.width,
                    seed=arguments.seed,
                    accelerator=arguments.accelerator,
                )
            )

    table = Table("precision", "test accuracy", "seconds", title="scikit-learn's digits, 360 test images")
    for result in results:
        table.add_row(result.precision, f"{result.accuracy:.2%}", f"{result.seconds:.1f}")
    console.print(table)
    return results


if __name__ == "__main__":
    main()
