"""Networks that people train, as small as they come: from transformers, built from a configuration, and from torch.

`ZOO` gives for every name a function that makes a LightningModule, the same one every time, and a batch for it.
"""

from collections.abc import Callable, Sequence

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, ...]
TOKENS, WIDTH, CLASSES = 128, 32, 4
_TEXT = {"vocab_size": TOKENS, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


class Task(L.LightningModule):
    """A network, its loss on a batch, and AdamW. Keeps every loss."""

    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, Sequence[Tensor]], Tensor]) -> None:
        super().__init__()
        self.net = net.train()
        self._loss = loss
        self.losses: list[float] = []

    def training_step(self, batch: Sequence[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(self.net, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def gpt2() -> tuple[Task, Batch]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **_TEXT, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return Task(GPT2LMHeadModel(config), _next_token), (_tokens(4, 32),)


def llama() -> tuple[Task, Batch]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **_TEXT,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return Task(LlamaForCausalLM(config), _next_token), (_tokens(4, 32),)


def bert() -> tuple[Task, Batch]:
    """Some tokens are hidden, and guessed."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        **_TEXT,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    hidden = torch.arange(32) % 5 == 0
    tokens = _tokens(4, 32)
    batch = tokens.masked_fill(hidden, 3), torch.ones_like(tokens), tokens.masked_fill(~hidden, -100)
    return Task(BertForMaskedLM(config), _masked_token), batch


def t5() -> tuple[Task, Batch]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=TOKENS,
        d_model=WIDTH,
        d_kv=WIDTH // 2,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return Task(T5ForConditionalGeneration(config), _text_to_text), (_tokens(4, 32), _tokens(4, 16))


def whisper() -> tuple[Task, Batch]:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        **_TEXT,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        num_mel_bins=8,
        max_source_positions=32,
        max_target_positions=16,
        decoder_start_token_id=1,
        dropout=0.0,
    )
    return Task(WhisperForConditionalGeneration(config), _speech_to_text), (_noise(4, 8, 64), _tokens(4, 16))


def vit() -> tuple[Task, Batch]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
        num_labels=CLASSES,
    )
    return Task(ViTForImageClassification(config), _image), _labelled(_noise(8, 3, 16, 16))


def resnet() -> tuple[Task, Batch]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[3, 1], layer_type="basic", num_labels=CLASSES)
    return Task(ResNetForImageClassification(config), _image), _labelled(_noise(8, 3, 32, 32))


def convnet() -> tuple[Task, Batch]:
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(8, CLASSES)),
    )
    return Task(net, _cross_entropy), _labelled(_noise(8, 3, 16, 16))


class _LastStep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.lstm(x)[0]
        return self.head(hidden[:, -1])


def lstm() -> tuple[Task, Batch]:
    return Task(_LastStep(), _cross_entropy), _labelled(_noise(8, 16, 8))


ZOO = {make.__name__: make for make in (gpt2, llama, bert, t5, whisper, vit, resnet, convnet, lstm)}


def make(name: str) -> tuple[Task, Batch]:
    """The module and the batch of `name`; the same values every time."""
    torch.manual_seed(0)
    return ZOO[name]()


def _tokens(*shape: int) -> Tensor:
    return torch.randint(4, TOKENS, shape)


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape)


def _labelled(inputs: Tensor) -> Batch:
    return inputs, torch.arange(len(inputs)) % CLASSES


def _next_token(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return net(input_ids=batch[0], labels=batch[0], use_cache=False).loss


def _masked_token(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return net(input_ids=batch[0], attention_mask=batch[1], labels=batch[2]).loss


def _text_to_text(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return net(input_ids=batch[0], labels=batch[1], use_cache=False).loss


def _speech_to_text(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return net(input_features=batch[0], labels=batch[1], use_cache=False).loss


def _image(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return net(pixel_values=batch[0], labels=batch[1]).loss


def _cross_entropy(net: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])
