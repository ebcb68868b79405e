"""Train a small GPT on bytes of Python's own standard library, in half precision with FP32 master weights.

    python examples/train_gpt.py                            # about two minutes on two CPU cores, bf16 there
    python examples/train_gpt.py --precision 32-true        # the same run, the ordinary way
    python examples/train_gpt.py --size small --steps 500   # on a GPU this is the default size

`GPT`, `GPTModule` and `ByteText` are ordinary PyTorch and Lightning and know nothing of master weights. lightning-mpt
is in two arguments of the Trainer: `plugins=[MasterWeightPrecision(...)]` and `profiler=MemoryProfiler()`.

The text is read, never downloaded: the .py files that every Python installation carries. One file in twenty is kept
for validation, chosen by a checksum of its path, so that the split is the same in every run.
"""

import argparse
import logging
import math
import sysconfig
import warnings
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import RichProgressBar
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset

from lightning_mpt.precisions import LIGHTNING, check_name, trainer_arguments
from lightning_mpt.precisions import OURS as MASTER_WEIGHTS
from lightning_mpt.profiler import MemoryProfiler

OURS = ("loss_scale", "master_weights", "optimizer_state", "gradient_release")
"""The options that go to `MasterWeightPrecision`."""


@dataclass(frozen=True)
class Size:
    """The shape of a GPT."""

    layers: int
    heads: int
    width: int


SIZES = {
    "nano": Size(layers=2, heads=2, width=32),  # for tests, and CPUs that are slow in bf16
    "tiny": Size(layers=4, heads=4, width=256),  # for two CPU cores
    "small": Size(layers=12, heads=12, width=768),  # GPT-2's smallest
    "medium": Size(layers=24, heads=16, width=1024),
    "xl": Size(layers=48, heads=25, width=1600),  # GPT-2's largest, of 1.5 billion parameters
}


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each on the normed stream and added back to it (pre-LN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each batch x heads x length x width of a head
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm_mlp(x))


class GPT(nn.Module):
    """A decoder-only transformer with learned positions, its output weights tied to the token embedding."""

    def __init__(self, size: Size, *, vocab_size: int = 256, seq_len: int = 256) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, size.width)
        self.positions = nn.Embedding(seq_len, size.width)
        self.blocks = nn.ModuleList(Block(size.width, size.heads) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, vocab_size, bias=False)
        self.head.weight = self.tokens.weight
        self.apply(self._init_weights)
        for name, parameter in self.named_parameters():
            # The two layers that write into the stream: scaled so that its variance does not grow with depth.
            if name.endswith(("out.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * size.layers))

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch x length x vocabulary) of the token after each of `tokens` (batch x length, int64)."""
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


class GPTModule(L.LightningModule):
    """Next-token training: cross entropy, AdamW, linear warm-up and then a cosine to a tenth of the learning rate."""

    def __init__(
        self,
        size: str = "tiny",
        *,
        vocab_size: int = 256,
        seq_len: int = 256,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        steps: int = 200,
        warmup_steps: int = 20,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.gpt = GPT(SIZES[size], vocab_size=vocab_size, seq_len=seq_len)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.gpt(tokens)

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Sequence[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self._loss(batch), prog_bar=True)

    def configure_optimizers(self) -> dict[str, Any]:
        matrices = [p for p in self.parameters() if p.ndim >= 2]
        vectors = [p for p in self.parameters() if p.ndim < 2]  # biases and norms are not decayed
        groups = [
            {"params": matrices, "weight_decay": self.hparams["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"], betas=(0.9, 0.95))
        factor = partial(lr_factor, warmup_steps=self.hparams["warmup_steps"], steps=self.hparams["steps"])
        scheduler = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def _loss(self, batch: Sequence[Tensor]) -> Tensor:
        inputs, targets = batch
        # float(): a loss wants FP32, whatever the weights are.
        return F.cross_entropy(self(inputs).float().flatten(0, 1), targets.flatten())


def lr_factor(step: int, *, warmup_steps: int, steps: int) -> float:
    """What the learning rate is multiplied by at `step`, counted from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, steps - warmup_steps))
    return 0.1 + 0.45 * (1.0 + math.cos(math.pi * progress))


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """`count` windows of a text, at places drawn from `seed`: inputs, and the same one byte on as targets (int64)."""

    def __init__(self, text: Tensor, *, count: int, seq_len: int, seed: int) -> None:
        if len(text) <= seq_len:
            raise ValueError(f"The text has {len(text)} bytes and a window takes {seq_len + 1}: use a smaller seq_len.")
        self.text = text
        self.seq_len = seq_len
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(text) - seq_len, (count,), generator=generator).tolist()

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        window = self.text[self.starts[index] : self.starts[index] + self.seq_len + 1].long()
        return window[:-1], window[1:]


class ByteText(L.LightningDataModule):
    """The standard library's source as bytes: `steps` training batches, and `validation_batches` from other files."""

    def __init__(
        self,
        *,
        seq_len: int = 256,
        batch_size: int = 16,
        steps: int = 200,
        validation_batches: int = 20,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()

    def setup(self, stage: str) -> None:
        self.train_text, self.validation_text = read_standard_library()

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        return self._loader(self.train_text, self.hparams["steps"], self.hparams["seed"])

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        # Its own fixed seed: the validation loss of two runs is comparable whatever they trained on.
        return self._loader(self.validation_text, self.hparams["validation_batches"], seed=1)

    def _loader(self, text: Tensor, batches: int, seed: int) -> DataLoader[tuple[Tensor, Tensor]]:
        batch_size = self.hparams["batch_size"]
        windows = Windows(text, count=batches * batch_size, seq_len=self.hparams["seq_len"], seed=seed)
        return DataLoader(windows, batch_size=batch_size)


def read_standard_library() -> tuple[Tensor, Tensor]:
    """The .py files of this Python's standard library as two uint8 texts: for training and for validation."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests"}
    texts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if left_out.isdisjoint(relative.parts):
            texts[zlib.crc32(relative.as_posix().encode()) % 20 == 0].append(path.read_bytes())
    if not all(texts):
        raise RuntimeError(f"{root} holds no .py files: use a Python that carries its standard library's source.")
    train, validation = (torch.frombuffer(bytearray(b"\n".join(text)), dtype=torch.uint8) for text in texts)
    return train, validation


def parse_precision(text: str) -> str:
    """A precision's name."""
    try:
        return check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_loss_scale(text: str) -> str | float | None:
    """`auto`, `dynamic`, `none`, or a number: the plugin says what numbers it takes."""
    if text in ("auto", "dynamic"):
        return text
    if text == "none":
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, dynamic, none or a positive number") from None


def multiplies_bf16() -> bool:
    """Whether torch has fast bf16 matrix products for this CPU. Without, they are many times slower than FP32's."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except AttributeError:  # not built with oneDNN: no way to tell
        return True


def quiet_lightning() -> None:
    """No start-up banner and no advice: this run is short, and its loader has next to nothing to do."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, its gaps filled with what suits the accelerator."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="default: tiny on CPU (nano without AVX-512), small on a GPU")
    parser.add_argument("--steps", type=int, help="default: 400 on CPU (100 without AVX-512), 1000 on a GPU")
    parser.add_argument(
        "--precision",
        type=parse_precision,
        metavar="NAME",
        help=f"one of {', '.join((*MASTER_WEIGHTS, *LIGHTNING))}, an mpt- one perhaps with :compact (7 bytes a "
        "parameter rather than 14) or :minimal (5); default: mpt-bf16-true on CPU, mpt-16-true on a GPU",
    )
    ours = parser.add_argument_group("for the mpt- precisions", argument_default=argparse.SUPPRESS)
    ours.add_argument("--loss-scale", type=parse_loss_scale, help="auto (default), dynamic, none or a number")
    ours.add_argument("--master-weights", help="split (default), split8 or float32")
    ours.add_argument("--optimizer-state", help="how the moments are stored: float32 (default), bfloat16 or 8bit")
    ours.add_argument("--gradient-release", action="store_true", help="update within backward; no clipping by norm")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seq-len", type=int, help="default: 256 on CPU, 1024 on a GPU")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--no-clipping", action="store_true", help="do not clip the gradients' norm to 1")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", choices=("auto", "cpu", "cuda"), default="auto")
    arguments = parser.parse_args(argv)
    if arguments.accelerator == "auto":
        arguments.accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.accelerator == "cuda":
        defaults = {"size": "small", "steps": 1000, "precision": "mpt-16-true", "seq_len": 1024}
    elif multiplies_bf16():
        defaults = {"size": "tiny", "steps": 400, "precision": "mpt-bf16-true", "seq_len": 256}
    else:
        print("This CPU has no AVX-512, and bf16 is many times slower than FP32 on it: a smaller GPT, fewer steps.")
        defaults = {"size": "nano", "steps": 100, "precision": "mpt-bf16-true", "seq_len": 256}
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    given = {name: getattr(arguments, name) for name in OURS if hasattr(arguments, name)}
    if given and not arguments.precision.startswith("mpt-"):
        option = "--" + next(iter(given)).replace("_", "-")
        parser.error(f"{option} is for the mpt- precisions and means nothing to {arguments.precision}: leave it out")
    arguments.ours = given
    return arguments


def main(argv: Sequence[str] | None = None) -> float:
    """Train and validate as the command line says. Returns the validation loss (nats per byte)."""
    arguments = parse_arguments(argv)
    quiet_lightning()
    L.seed_everything(arguments.seed, verbose=False)
    module = GPTModule(
        arguments.size,
        seq_len=arguments.seq_len,
        lr=arguments.lr,
        steps=arguments.steps,
        warmup_steps=max(1, arguments.steps // 10),
    )
    data = ByteText(
        seq_len=arguments.seq_len, batch_size=arguments.batch_size, steps=arguments.steps, seed=arguments.seed
    )
    released = arguments.precision.endswith(":minimal") or "gradient_release" in arguments.ours
    trainer = L.Trainer(
        accelerator=arguments.accelerator,
        devices=1,
        max_epochs=1,  # of exactly --steps batches
        # The norm of gradients that are gone is not to be had.
        gradient_clip_val=None if released or arguments.no_clipping else 1.0,
        callbacks=[RichProgressBar()],
        profiler=MemoryProfiler(),
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **trainer_arguments(arguments.precision, **arguments.ours),
    )
    trainer.fit(module, data)
    loss = trainer.callback_metrics["val_loss"].item()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    print(f"{arguments.precision}: {arguments.steps} steps of {parameters:,} parameters")
    print(f"validation loss {loss:.4f} nats per byte ({loss / math.log(2):.3f} bits)")
    return loss


if __name__ == "__main__":
    main()
