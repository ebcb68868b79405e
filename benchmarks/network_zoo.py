"""The networks that people train, from their own libraries' code, with fresh weights: nothing is downloaded.

Trained as in their papers, as far as memory is concerned: auxiliary heads (GoogLeNet, Inception v3), dropout, masked
language modelling (BERT). One thing is the same for all: AdamW, where the older ones were trained with momentum, whose
state is half as large.
"""

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.recorded import Step

CLASSES = 1000
GPT2_VOCABULARY, GPT2_SEQ_LEN, GPT2_BATCH_SIZE = 50257, 1024, 8
HEAD_WIDTH = 64


@dataclass(frozen=True)
class Network:
    """A network and its batch.

    Attributes:
        name: as people call it.
        build: makes it, with fresh weights.
        sample: one sample of its batch: name -> shape and the number of classes to draw from, None for floats; for
            `images` and `labels` the batch is a pair, else a dict.
        batch_size: samples in a batch that people would choose.
        library: whose code it is.
        smallest_batch: two, where batch norm refuses a single sample.
    """

    name: str
    build: Callable[[], nn.Module]
    sample: Mapping[str, tuple[tuple[int, ...], int | None]]
    batch_size: int
    library: str
    smallest_batch: int = 1

    def module(self) -> Step:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GoogLeNet's and Inception's, on how they draw their weights
            return Step(self.build())

    def batch(self, size: int = 1) -> Any:
        """Random samples on the CPU, as a loader would give them."""
        tensors = {
            name: torch.randn(size, *shape) if classes is None else torch.randint(classes, (size, *shape))
            for name, (shape, classes) in self.sample.items()
        }
        return list(tensors.values()) if "images" in tensors else tensors

    @property
    def input(self) -> str:
        """The size of a sample: `224 x 224`, or the number of tokens."""
        shape = next(iter(self.sample.values()))[0]
        return " x ".join(map(str, shape[-2:])) if len(shape) > 1 else f"{shape[0]} tokens"


NAMES = (
    "AlexNet", "VGG-16", "GoogLeNet", "Inception v3", "ResNet-50", "ViT-B/16",
    "GPT-2 small", "GPT-2 medium", "GPT-2 large", "GPT-2 XL", "BERT-base", "BERT-large",
)  # fmt: skip
"""In the order in which they are shown."""


def networks() -> dict[str, Network]:
    """All that can be built here: without torchvision ResNet-50 is transformers', and the older ones are left out."""
    found = [gpt2_network(name, **size) for name, size in GPT2.items()]
    found += [_bert("BERT-base", 768, 12), _bert("BERT-large", 1024, 24)]
    images = [_images(*each, "torchvision") for each in TORCHVISION] if has_torchvision() else [_resnet50()]
    every = [*images, _images("ViT-B/16", _vit, 224, 128, "transformers"), *found]
    return {network.name: network for network in every}


# -- images -----------------------------------------------------------------------------------------------------------


def has_torchvision() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def _of_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from torchvision import models

        net: nn.Module = getattr(models, name)(weights=None, **options)
        return net

    return build


TORCHVISION: tuple[tuple[str, Callable[[], nn.Module], int, int], ...] = (
    ("AlexNet", _of_torchvision("alexnet"), 224, 256),
    ("VGG-16", _of_torchvision("vgg16"), 224, 64),
    ("GoogLeNet", _of_torchvision("googlenet", aux_logits=True), 224, 128),
    ("Inception v3", _of_torchvision("inception_v3", aux_logits=True), 299, 64),
    ("ResNet-50", _of_torchvision("resnet50"), 224, 128),
)
"""Name, what builds it, width and height of an image, samples in a batch."""


def _images(name: str, build: Callable[[], nn.Module], size: int, batch_size: int, library: str) -> Network:
    images = "pixel_values" if library == "transformers" else "images"
    sample = {images: ((3, size, size), None), "labels": ((), CLASSES)}
    return Network(name, build, sample, batch_size, library, smallest_batch=2)


def _resnet50() -> Network:
    def build() -> nn.Module:
        from transformers import ResNetConfig, ResNetForImageClassification

        return ResNetForImageClassification(ResNetConfig(num_labels=CLASSES))

    return _images("ResNet-50", build, 224, 128, "transformers")


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(num_labels=CLASSES))


# -- text -------------------------------------------------------------------------------------------------------------

GPT2: dict[str, dict[str, int]] = {
    "GPT-2 small": {"layers": 12, "heads": 12},
    "GPT-2 medium": {"layers": 24, "heads": 16},
    "GPT-2 large": {"layers": 36, "heads": 20},
    "GPT-2 XL": {"layers": 48, "heads": 25},
}
"""A head is 64 wide."""


def gpt2(layers: int, heads: int, **settings: Any) -> nn.Module:
    """GPT-2 of that many layers, heads of 64 a layer, and everything else as it was trained or as `settings` say."""
    from transformers import GPT2Config, GPT2LMHeadModel

    width = {"n_embd": HEAD_WIDTH * heads, "n_layer": layers, "n_head": heads}
    net = GPT2LMHeadModel(GPT2Config(use_cache=False, **(width | settings)))
    net.loss_type = "ForCausalLM"  # what it takes anyway, after a warning
    return net


def small_gpt2(*, layers: int, heads: int, vocab_size: int, seq_len: int, **settings: Any) -> nn.Module:
    """The same over few tokens, for what a CPU trains."""
    few = {"vocab_size": vocab_size, "n_positions": seq_len, "bos_token_id": 0, "eos_token_id": 0}
    return gpt2(layers, heads, **(few | settings))


def gpt2_network(name: str, layers: int, heads: int) -> Network:
    """It, with a batch of 8 x 1024 tokens."""
    tokens = ((GPT2_SEQ_LEN,), GPT2_VOCABULARY)
    sample = {"input_ids": tokens, "labels": tokens}
    return Network(name, lambda: gpt2(layers, heads), sample, GPT2_BATCH_SIZE, "transformers")


def _bert(name: str, width: int, layers: int) -> Network:
    def build() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        return BertForMaskedLM(
            BertConfig(
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=width // HEAD_WIDTH,
                intermediate_size=4 * width,
            )
        )

    tokens = ((512,), 30522)
    return Network(name, build, {"input_ids": tokens, "labels": tokens}, 32, "transformers")
