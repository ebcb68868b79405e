"""Training loops of several kinds, each a function that runs some steps; for the profiler's tests."""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lightning_mpt.profiler import MemoryRecorder, MemoryReport

Loss = Callable[[nn.Module, torch.Generator], torch.Tensor]
"""From the module, and the generator of its data, the loss of one step."""


class Loop:
    """A module, its optimizer, and the step that trains it. The same every time that it is made."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        self.module = module
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        self._loss = loss

    def step(self, i: int) -> float:
        loss = self._loss(self.module, torch.Generator().manual_seed(i))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def record(loop: Loop, *, steps: int = 2, warmup_steps: int = 1, **options) -> MemoryReport:
    """The report of `steps` of a loop, after `warmup_steps`."""
    with MemoryRecorder(loop.module, loop.optimizer, warmup_steps=warmup_steps, **options) as recorder:
        for i in range(warmup_steps + steps):
            loop.step(i)
            recorder.step()
    return recorder.report


def mlp() -> Loop:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 10))
    return Loop(module, _classify(lambda g: torch.randn(128, 64, generator=g)))


def convnet() -> Loop:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(10)
    )
    module(torch.zeros(2, 1, 16, 16))
    return Loop(module, _classify(lambda g: torch.randn(32, 1, 16, 16, generator=g)))


class _LastStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 64, num_layers=2, dropout=0.1, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def lstm() -> Loop:
    torch.manual_seed(0)
    return Loop(_LastStep(), _classify(lambda g: torch.randn(16, 40, 32, generator=g)))


def gpt2(*, checkpointing: bool = False) -> Loop:
    """A small GPT-2 from transformers: tied embeddings, dropout, sequences long enough that activations matter."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=2,
        n_embd=64,
        n_head=2,
        vocab_size=256,
        n_positions=128,
        bos_token_id=0,
        eos_token_id=0,
        loss_type="ForCausalLM",
    )
    module = GPT2LMHeadModel(config).train()
    if checkpointing:
        enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        tokens = torch.randint(0, 256, (4, 128), generator=generator)
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    return Loop(module, loss)


class Blocks(nn.Module):
    """Residual blocks; `reentrant` says how they are checkpointed, None that they are not."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 64), nn.Dropout(0.1)) for _ in range(4)
        )
        self.first = nn.Linear(64, 64)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            again = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
            x = x + again
        return x


def blocks(reentrant: bool | None = None) -> Loop:
    torch.manual_seed(0)
    return Loop(Blocks(reentrant), lambda model, g: model(torch.randn(256, 64, generator=g)).square().mean())


def _classify(
    inputs: Callable[[torch.Generator], torch.Tensor],
) -> Callable[[nn.Module, torch.Generator], torch.Tensor]:
    def loss(model: nn.Module, generator: torch.Generator) -> torch.Tensor:
        x = inputs(generator)
        y = torch.randint(0, 10, (len(x),), generator=generator)
        return nn.functional.cross_entropy(model(x), y)

    return loss


LOOPS = {
    "mlp": mlp,
    "convnet": convnet,
    "lstm": lstm,
    "gpt2": gpt2,
    "gpt2-checkpointed": lambda: gpt2(checkpointing=True),
    "blocks-checkpointed": lambda: blocks(reentrant=False),
    "blocks-checkpointed-reentrant": lambda: blocks(reentrant=True),
}
