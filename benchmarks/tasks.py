"""The tasks that `accuracy.py` trains: five kinds of network, each so small that a run takes seconds.

A seed draws the initial weights and the order of the data; what is held back is always the same. Every figure is
better when it is lower.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, RandomSampler
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.common import SILENT
from benchmarks.gan import GAN, flat, frechet_distance, latents
from benchmarks.half_products import HalfProducts, native
from examples.train_digits import Digits, DigitsModule
from examples.train_gpt import ByteText, GPTModule, quiet_lightning, read_standard_library
from lightning_mpt.precisions import trainer_arguments

REFERENCE, UNCLIPPED = "32-true", "32-true, unclipped"
MINIMAL = "mpt-bf16-true:minimal"
IMAGES = 64
"""Images of a batch."""


@dataclass(frozen=True)
class Task:
    """A network to train, and the figure that tells how well it went."""

    name: str
    what: str
    unit: str
    steps: int
    """How many training steps, unless another number is asked for."""
    train: Callable[[L.Trainer, int, int], float]
    """Trains with a Trainer from a seed for so many steps, and gives the figure."""
    clips: bool
    """Whether the gradients' norm is clipped to 1."""
    by_hand: bool = False
    """Whether the module steps its optimizers itself, which `minimal` does not go with."""

    def precisions(self, accelerator: str) -> tuple[str, ...]:
        """All that the task is trained under on a device of that kind."""
        fp16 = ("16-mixed", "16-true") if accelerator == "cuda" else ()
        minimal = () if self.by_hand else (UNCLIPPED, MINIMAL) if self.clips else (MINIMAL,)
        ours = ("mpt-bf16-true", "mpt-16-true", "mpt-bf16-true:compact")
        return (REFERENCE, "bf16-mixed", "bf16-true", *fp16, *ours, *minimal)

    def reference_of(self, precision: str) -> str:
        """What a precision is held against: the FP32 run that is clipped as it is."""
        return UNCLIPPED if self.clips and precision in (UNCLIPPED, MINIMAL) else REFERENCE

    def run(self, precision: str, seed: int, steps: int, accelerator: str) -> float | None:
        """The figure of one run; None where it is inf or NaN."""
        quiet_lightning()
        L.seed_everything(seed, verbose=False)
        trainer = L.Trainer(
            accelerator=accelerator,
            devices=1,
            max_epochs=1,  # of exactly `steps` batches
            gradient_clip_val=1.0 if self.clips and self.reference_of(precision) == REFERENCE else None,
            num_sanity_val_steps=0,
            **SILENT,
            **trainer_arguments(precision.removesuffix(", unclipped")),
        )
        fast = precision.startswith(REFERENCE) or accelerator == "cuda" or native()
        with nullcontext() if fast else HalfProducts():
            figure = self.train(trainer, seed, steps)
        return figure if math.isfinite(figure) else None


class Learner(L.LightningModule):
    """A network under cross entropy and AdamW, its learning rate let up and down over the run."""

    def __init__(self, net: nn.Module, lr: float) -> None:
        super().__init__()
        self.net, self.lr = net, lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self._loss(batch)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        schedule = OneCycleLR(optimizer, self.lr, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _loss(self, batch: list[Tensor]) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(self.net(inputs).float().flatten(0, -2), targets.flatten())


class ByteLSTM(nn.Module):
    """Logits of the byte after each of a text's bytes (batch x length, int64)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        hidden: Tensor = self.lstm(self.bytes(text))[0]
        return self.head(hidden)


class ViT(nn.Module):
    """Logits of the ten digits, from images of 8 x 8 pixels in patches of 2 x 2."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=8,
            patch_size=2,
            num_channels=1,
            num_labels=10,
        )
        self.vit = ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.vit(pixel_values=images).logits
        return logits


class ValidatedDigits(DigitsModule):
    """The example's network, with the loss on what is held back: accuracy would count one image in 360."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.log("val_loss", F.cross_entropy(self(images).float(), labels))


texts = cache(read_standard_library)


class Bytes(ByteText):
    """The example's text, read once in a process."""

    def setup(self, stage: str) -> None:
        self.train_text, self.validation_text = texts()


def gpt(trainer: L.Trainer, seed: int, steps: int) -> float:
    module = GPTModule("nano", seq_len=64, steps=steps, warmup_steps=max(1, steps // 10))
    return _loss_on_bytes(trainer, module, Bytes(seq_len=64, batch_size=16, steps=steps, seed=seed))


def lstm(trainer: L.Trainer, seed: int, steps: int) -> float:
    # Short texts: a half LSTM goes through them byte by byte on a CPU.
    data = Bytes(seq_len=16, batch_size=64, steps=steps, seed=seed)
    return _loss_on_bytes(trainer, Learner(ByteLSTM(), 1e-2), data)


def digits(trainer: L.Trainer, seed: int, steps: int) -> float:
    return _loss_on_digits(trainer, ValidatedDigits(width=16), seed, steps)


def vit(trainer: L.Trainer, seed: int, steps: int) -> float:
    return _loss_on_digits(trainer, Learner(ViT(), 3e-3), seed, steps)


def gan(trainer: L.Trainer, seed: int, steps: int) -> float:
    module, data = GAN(), _digits()
    trainer.fit(module, _training_images(data, seed, steps))
    fixed = latents(4096, torch.Generator().manual_seed(1))
    generated = trainer.predict(module, DataLoader(fixed, batch_size=len(fixed)))  # type: ignore[arg-type]
    real = torch.cat([data.train_set.tensors[0], data.test_set.tensors[0]])
    return frechet_distance(flat(real), torch.cat(generated))  # type: ignore[arg-type]


def _loss_on_bytes(trainer: L.Trainer, module: L.LightningModule, data: ByteText) -> float:
    trainer.fit(module, datamodule=data)
    return trainer.callback_metrics["val_loss"].item()


def _loss_on_digits(trainer: L.Trainer, module: L.LightningModule, seed: int, steps: int) -> float:
    data = _digits()
    trainer.fit(module, _training_images(data, seed, steps), data.test_dataloader())
    return trainer.callback_metrics["val_loss"].item()


def _digits() -> Digits:
    data = Digits()
    data.setup("fit")
    return data


def _training_images(data: Digits, seed: int, steps: int) -> DataLoader[tuple[Tensor, ...]]:
    """`steps` batches: as many epochs as that takes, each in an order of its own."""
    order = torch.Generator().manual_seed(seed)
    sampler = RandomSampler(data.train_set, num_samples=steps * IMAGES, generator=order)
    return DataLoader(data.train_set, batch_size=IMAGES, sampler=sampler)


TASKS = {
    task.name: task
    for task in (
        Task("gpt", "the example's GPT, `nano`", "nats per byte", 100, gpt, clips=True),
        Task("lstm", "an LSTM over the same bytes", "nats per byte", 100, lstm, clips=True),
        Task("digits", "the example's convolutions with BatchNorm", "nats per image", 100, digits, clips=False),
        Task("vit", "a vision transformer on the same digits", "nats per image", 120, vit, clips=False),
        Task("gan", "a GAN on the same digits", "Fréchet distance", 200, gan, clips=False, by_hand=True),
    )
}
