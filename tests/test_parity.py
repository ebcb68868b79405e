"""The plugin against the paper's pipeline, written out here in plain torch and sharing nothing with it."""

import copy
import math
from collections.abc import Callable

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training import Classifier, adamw, classification, fit, mlp
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mpt import MasterWeightPrecision

HALVES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
STEPS = 20
LOSS_TOLERANCE = 1e-3
"""Relative. Worst seen: 1.1e-4 on GPT-2, whose masters end within 3.3 % of the way; on the MLP within 0.001 %."""


def paper_loop(
    module: nn.Module,
    loss_of: Callable[[nn.Module, tuple[Tensor, ...]], Tensor],
    batches: list[tuple[Tensor, ...]],
    *,
    dtype: torch.dtype,
    scale: float,
    lr: float,
    clip: float | None = None,
) -> tuple[list[float], list[Tensor]]:
    """Micikevicius et al., figure 1: FP32 masters, half weights, a scaled loss, FP32 gradients and update."""
    masters = [parameter.detach().clone() for parameter in module.parameters()]
    module = module.to(dtype)
    optimizer = torch.optim.AdamW(masters, lr=lr)
    losses = []
    for batch in batches:
        loss = loss_of(module, batch)
        losses.append(loss.item())
        (loss.float() * scale).backward()
        for master, parameter in zip(masters, module.parameters(), strict=True):
            assert parameter.grad is not None
            master.grad = parameter.grad.float() / scale
            parameter.grad = None
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(masters, clip)
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters, module.parameters(), strict=True):
                parameter.copy_(master)
    return losses, masters


@torch.no_grad()
def distance_of_the_way(start: list[Tensor], end: list[Tensor], other: list[Tensor]) -> float:
    """|end - other| over |end - start|, over all parameters together."""
    apart = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(end, other, strict=True)))
    way = math.sqrt(sum(float((a - b).double().square().sum()) for a, b in zip(end, start, strict=True)))
    return apart / way


def tied_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=256,
        n_positions=64,
        n_embd=96,
        n_layer=3,
        n_head=4,
        bos_token_id=None,
        eos_token_id=None,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def sequences(count: int, *, size: int, length: int) -> list[tuple[Tensor, ...]]:
    """Batches of tokens that count upward from anywhere: a language that can be learned."""
    generator = torch.Generator().manual_seed(0)
    return [((torch.randint(256, (size, 1), generator=generator) + torch.arange(length)) % 256,) for _ in range(count)]


class LanguageModule(L.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, ...], batch_idx: int) -> Tensor:
        loss = self.net(input_ids=batch[0], labels=batch[0]).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.parametrize("master_weights", ["split", "float32"])
@pytest.mark.parametrize("precision", HALVES)
def test_gpt2_with_tied_embeddings_follows_the_papers_pipeline(precision: str, master_weights: str) -> None:
    batches = sequences(STEPS, size=4, length=64)
    scale = 1024.0 if precision == "16-true" else 1.0
    net = tied_gpt2()
    start = [parameter.detach().clone() for parameter in net.parameters()]

    module = LanguageModule(copy.deepcopy(net).train())
    fit(module, batches, MasterWeightPrecision(precision, loss_scale=scale, master_weights=master_weights))  # type: ignore[arg-type]
    losses, masters = paper_loop(
        net.train(),
        lambda net, batch: net(input_ids=batch[0], labels=batch[0]).loss,
        batches,
        dtype=HALVES[precision],
        scale=scale,
        lr=1e-3,
    )

    worst = max(abs(ours / theirs - 1) for ours, theirs in zip(module.losses, losses, strict=True))
    way = distance_of_the_way(start, masters, list(module.parameters()))
    print(f"worst loss {worst:.2e}, masters {way:.2%} of the way")
    assert losses[-1] < losses[0]
    assert worst < LOSS_TOLERANCE
    assert way < 0.10  # AdamW's first steps are near lr sign(g): forward's rounding decides more than that
    assert module.net.transformer.wte.weight is module.net.lm_head.weight


@pytest.mark.parametrize("clip", [None, 0.05], ids=["unclipped", "clipped"])
@pytest.mark.parametrize("precision", HALVES)
def test_the_masters_of_an_mlp_end_where_the_papers_pipeline_ends(precision: str, clip: float | None) -> None:
    batches = classification(STEPS)
    scale = 1024.0 if precision == "16-true" else 1.0
    net = mlp()
    start = [parameter.detach().clone() for parameter in net.parameters()]

    module = Classifier(copy.deepcopy(net), adamw(1e-3))
    fit(module, batches, MasterWeightPrecision(precision, loss_scale=scale), gradient_clip_val=clip)  # type: ignore[arg-type]
    dtype = HALVES[precision]
    losses, masters = paper_loop(
        net,
        lambda net, batch: F.cross_entropy(net(batch[0].to(dtype)).float(), batch[1]),
        batches,
        dtype=dtype,
        scale=scale,
        lr=1e-3,
        clip=clip,
    )

    way = distance_of_the_way(start, masters, list(module.parameters()))
    print(f"masters {way:.3%} of the way")
    assert way < 0.005
    assert max(abs(ours / theirs - 1) for ours, theirs in zip(module.losses, losses, strict=True)) < LOSS_TOLERANCE


def test_split_and_float32_masters_train_bit_for_bit_alike_over_200_steps_in_bf16() -> None:
    batches = sequences(200, size=2, length=32)
    ends = []
    for master_weights in ("split", "float32"):
        module = LanguageModule(tied_gpt2().train())
        fit(module, batches, MasterWeightPrecision("bf16-true", master_weights=master_weights), gradient_clip_val=1.0)
        ends.append((module.losses, [parameter.detach() for parameter in module.parameters()]))
    (split_losses, split), (float32_losses, float32) = ends
    assert split_losses == float32_losses
    assert all(torch.equal(a, b) for a, b in zip(split, float32, strict=True))


def test_masters_move_where_bf16_weights_alone_would_stand_still() -> None:
    """What masters are for: an update of 1e-5 is lost to the rounding of a bf16 weight of 0.1."""
    batches = classification(50)
    net = mlp()
    start = [parameter.detach().clone() for parameter in net.parameters()]
    module = Classifier(copy.deepcopy(net), adamw(1e-5, weight_decay=0.0))
    fit(module, batches, MasterWeightPrecision("bf16-true"))
    reference = Classifier(copy.deepcopy(net), adamw(1e-5, weight_decay=0.0))
    fit(reference, batches)
    assert distance_of_the_way(start, list(reference.parameters()), list(module.parameters())) < 0.1
