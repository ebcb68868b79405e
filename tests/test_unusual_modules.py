"""Modules and habits that are rarer than a linear layer, each against the same run in FP32."""

import copy
import sys
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelPruning
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence
from training import Classifier, adamw, classification, fit, loader, mlp, trainer

from lightning_mpt import MasterWeightPrecision

HALVES = {"16-true": torch.float16, "bf16-true": torch.bfloat16}
DISTANCE = 0.2
"""Of the way that FP32 training has gone. AdamW's first steps go by the sign of a gradient."""


class Attention(nn.Module):
    """Four tokens of four features, with a mask of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend, self.head = (
            nn.Linear(4, 32),
            nn.MultiheadAttention(32, 4, batch_first=True),
            nn.Linear(32, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.view(-1, 4, 4))
        padded = torch.zeros(tokens.shape[:2], dtype=torch.bool)
        padded[:, 3] = True
        causal = torch.ones(4, 4, dtype=torch.bool).triu(1)
        attended, _ = self.attend(tokens, tokens, tokens, key_padding_mask=padded, attn_mask=causal)
        return self.head(attended.mean(dim=1))


class Scores(nn.Module):
    """Attention by hand, with the masks that people write: -1e9 is beyond float16, FP32's lowest beyond bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.view(-1, 4, 4))
        scores = torch.einsum("bqd,bkd->bqk", tokens, tokens) / 4 + torch.full((4, 4), -1e9).triu(1)
        scores = scores.clamp(min=-1e9).masked_fill(torch.arange(4) == 3, torch.finfo(torch.float32).min)
        return self.head((scores.softmax(dim=-1) @ tokens).mean(dim=1))


class Seq2Seq(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 32), nn.Linear(32, 4)
        self.transformer = nn.Transformer(32, 4, 1, 1, 64, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x.view(-1, 4, 4))
        causal = nn.Transformer.generate_square_subsequent_mask(4)
        return self.head(self.transformer(tokens, tokens, tgt_mask=causal, tgt_is_causal=True)[:, -1])


class Packed(nn.Module):
    """Sequences of one to four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(4, 16, 2, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x)) % 4 + 1
        _, last = self.gru(pack_padded_sequence(x.view(-1, 4, 4), lengths, batch_first=True, enforce_sorted=False))
        return self.head(last[-1])


class Bags(nn.Module):
    """Which of the features are positive, as bags of words."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.sum, self.head = nn.EmbeddingBag(32, 16), nn.EmbeddingBag(32, 16, mode="sum"), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        words = torch.arange(16) + 16 * (x > 0)
        return self.head(self.mean(words) + self.sum(words, per_sample_weights=x / 16))


class Lists(nn.Module):
    """Parameters in a list and a dictionary, and a buffer that is no parameter's neighbour."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(16, 16) / 4 for _ in range(2)])
        self.head = nn.ParameterDict({"weight": torch.randn(16, 4) / 4, "bias": torch.zeros(4)})
        self.register_buffer("scale", torch.rand(16) + 0.5, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = torch.tanh(x @ weight) * self.scale
        return x @ self.head["weight"] + self.head["bias"]


class Adapted(nn.Module):
    """A frozen layer and a small product beside it (LoRA)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(base.in_features, 4, bias=False), nn.Linear(4, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Volume(nn.Module):
    """An invertible layer whose logarithm of the determinant is part of what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.eye(16) + torch.randn(16, 16) / 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(torch.linalg.solve(self.weight, x.T).T)
        volume = torch.linalg.slogdet(self.weight).logabsdet
        assert volume.dtype == torch.float32
        return logits + torch.arange(4) * volume


class Spectrum(nn.Module):
    """The likeness of a spectrum to one of each class."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.classes = nn.Linear(16, 32), nn.Parameter(torch.randn(4, 17))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.embed(x), norm="ortho").abs().to(x.dtype)
        return torch.cat([-torch.cdist(part, self.classes) for part in spectrum.split(8)])


def layers(wrap: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), wrap(nn.Linear(32, 32)), nn.Tanh(), nn.Linear(32, 4))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: layers(parametrizations.weight_norm),
    "spectral norm": lambda: layers(parametrizations.spectral_norm),
    "orthogonal": lambda: layers(parametrizations.orthogonal),
    "Cayley": lambda: layers(lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley")),
    "pruned": lambda: layers(lambda layer: prune.l1_unstructured(layer, "weight", 0.5)),
    "adapters": lambda: layers(Adapted),
    "attention": Attention,
    "attention by hand": Scores,
    "transformer": Seq2Seq,
    "packed": Packed,
    "bags": Bags,
    "lists": Lists,
    "volume": Volume,
    "spectrum": Spectrum,
}


def values(module: nn.Module) -> Tensor:
    return torch.cat([value.flatten() for value in module.state_dict().values()])


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("name", MODULES)
def test_a_module_trains_as_in_fp32(name: str, precision: Any) -> None:
    runs = []
    for plugin in (None, MasterWeightPrecision(precision)):
        torch.manual_seed(0)
        module = Classifier(MODULES[name]())
        start = values(module)
        fit(module, classification(20), plugin)
        runs.append(values(module))
        assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    fp32, ours = runs
    distance = ((ours - fp32).norm() / (fp32 - start).norm()).item()
    print(f"{name} in {precision}: {distance:.4f}")
    assert distance <= DISTANCE


@pytest.mark.parametrize("dtype", HALVES.values(), ids=str)
@pytest.mark.parametrize(
    "function",
    [
        *(torch.matrix_exp, torch.linalg.inv, Tensor.inverse, torch.linalg.qr, torch.svd),
        *(torch.fft.rfft2, torch.fft.hfft, lambda x: torch.cdist(x, x[1:]), F.pdist, lambda x: x.quantile(0.3, dim=0)),
    ],
)
def test_what_half_has_no_kernels_for_is_computed_in_fp32(function: Any, dtype: torch.dtype) -> None:
    matrix = (torch.eye(4) + torch.arange(16.0).view(4, 4) / 32).to(dtype)
    expected, plugin = function(matrix.float()), MasterWeightPrecision("bf16-true")
    with plugin.forward_context():
        found = function(matrix)
    for ours, fp32 in zip(
        *(result if isinstance(result, tuple) else (result,) for result in (found, expected)), strict=True
    ):
        assert torch.equal(ours, fp32 if fp32.is_complex() else fp32.to(dtype))


@pytest.mark.parametrize("precision", HALVES)
def test_a_loss_by_hand_may_sum_more_than_float16_holds(precision: Any) -> None:
    class Dice(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            found, wanted = self(batch[0]).sigmoid(), (batch[0] > 0).to(batch[0].dtype)
            loss = 1 - 2 * (found * wanted).sum() / (found.sum() + torch.sum(wanted))
            self.losses.append(loss.item())
            return loss

    losses = []
    for plugin in (None, MasterWeightPrecision(precision)):
        module = Dice(mlp(classes=16))
        fit(module, classification(4, size=2**14), plugin)
        losses.append(module.losses)
    assert losses[1] == pytest.approx(losses[0], rel=2e-3)


class Centered(nn.Module):
    """Takes a mean away that it keeps over many batches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.count += 1
            self.mean.lerp_(x.mean(dim=0) + 1, 0.01)
        return x - self.mean


@pytest.mark.parametrize("precision", HALVES)
def test_running_sums_of_ones_own_are_those_of_fp32_where_their_module_is_named(precision: Any) -> None:
    kept = []
    for plugin in (None, MasterWeightPrecision(precision, fp32_modules=(Centered, nn.BatchNorm1d))):
        net = nn.Sequential(Centered(), nn.BatchNorm1d(16), mlp(width=16))
        fit(Classifier(net), classification(300, size=4), plugin)
        assert net[0].count == net[1].num_batches_tracked == 300
        kept.append(torch.cat([net[0].mean, net[1].running_var]))
    torch.testing.assert_close(kept[1], kept[0], rtol=0.01, atol=1e-3)


@pytest.mark.parametrize("precision", HALVES)
def test_masks_that_pruning_makes_in_training_are_fp32_in_files_and_after_fit(precision: Any) -> None:
    class Prunes(Classifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                prune.l1_unstructured(self.net[0], "weight", 0.5)
            if self.current_epoch == 2:
                self.saved = self.state_dict()
                prune.l1_unstructured(self.net[2], "weight", 0.5)
                prune.remove(self.net[2], "weight")

    module = Prunes(mlp())
    fit(module, classification(4), MasterWeightPrecision(precision), max_epochs=3)
    for state_dict in (module.saved, module.state_dict()):
        assert "net.0.weight_mask" in state_dict
        assert {value.dtype for value in state_dict.values()} == {torch.float32}
    assert (module.net[0].weight == 0).float().mean() == 0.5


@pytest.mark.parametrize("master_weights", ["split", "float32"])
@pytest.mark.parametrize("precision", HALVES)
def test_weights_that_are_exchanged_for_fp32_ones_are_the_masters(precision: Any, master_weights: str) -> None:
    """By `parameter.data = ...`, which makes a half parameter FP32."""
    start = copy.deepcopy(mlp().state_dict())

    class Rewinds(Classifier):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                for name, parameter in self.net.named_parameters():
                    parameter.data = start[name].clone()

        def on_train_batch_start(self, *_: Any) -> None:
            self.was = self.net.state_dict()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.current_epoch == 1 and batch_idx == 0:
                torch.testing.assert_close(self.net.state_dict(), start, rtol=0, atol=0)
                assert {parameter.dtype for parameter in self.parameters()} == {HALVES[precision]}
            return super().training_step(batch, batch_idx)

    module = Rewinds(mlp())
    fit(module, classification(4), MasterWeightPrecision(precision, master_weights=master_weights), max_epochs=2)
    assert module.losses[4] == module.losses[0]
    assert module.losses[5] != module.losses[4]


def test_lightnings_lottery_tickets_are_drawn_as_in_fp32() -> None:
    """Once: on a CPU, FP32 training then goes on in the very tensors that it was to be rewound to."""
    runs = []
    for plugin in (None, MasterWeightPrecision("16-true")):
        module = Classifier(mlp())
        pruning = ModelPruning("l1_unstructured", amount=0.3, apply_pruning=lambda epoch: epoch == 0)
        fit(module, classification(10), plugin, callbacks=[pruning], max_epochs=2)
        runs.append(module.losses)
    assert runs[1] == pytest.approx(runs[0], rel=0.002)


FLAVOURS: dict[str, dict[str, Any]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for-loop": {"foreach": False},
    "tensor lr": {"lr": torch.tensor(2**-6)},
}


@pytest.mark.parametrize("precision", HALVES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_how_adamw_was_to_be_computed_changes_nothing(flavour: str, precision: Any) -> None:
    runs = []
    for options in ({}, FLAVOURS[flavour]):
        module = Classifier(mlp(), adamw(**{"lr": 2**-6, **options}))
        fit(module, classification(5), MasterWeightPrecision(precision))
        runs.append(module.state_dict())
    torch.testing.assert_close(runs[1], runs[0], rtol=0, atol=0)


class Spectral(nn.Module):
    """A filter on the Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        self.filter, self.head = nn.Parameter(torch.randn(9, dtype=torch.complex64)), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.fft.irfft(torch.fft.rfft(x.float()) * self.filter, n=16).to(x.dtype))


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_complex_parameter_is_refused_by_name_unless_it_is_frozen(optimizer: Any) -> None:
    module = Classifier(Spectral(), lambda module: optimizer(module.net.head.parameters(), lr=0.1))
    start = module.net.filter.detach().clone()
    with pytest.raises(TypeError, match=r"net.filter is torch.complex64.*torch.view_as_real.*or freeze it"):
        fit(module, classification(1), MasterWeightPrecision("16-true"))
    module.net.filter.requires_grad_(False)
    fit(module, classification(5), MasterWeightPrecision("16-true"))
    assert module.losses[-1] < module.losses[0]
    assert torch.equal(module.net.filter, start)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes from Python 3.11 on")
def test_an_error_of_torchs_about_dtypes_is_explained() -> None:
    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position, self.rnn = torch.zeros(16), nn.RNN(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x + self.position)[0]

    with pytest.raises((RuntimeError, ValueError), match="bfloat16") as raised:
        fit(Classifier(Position()), classification(1), MasterWeightPrecision("bf16-true"))
    assert any("register_buffer" in note for note in raised.value.__notes__)
    position = nn.Sequential(Position())
    fit(Classifier(position), classification(1), MasterWeightPrecision("bf16-true", autocast=True))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exceptions take notes from Python 3.11 on")
@pytest.mark.parametrize("precision", HALVES)
def test_an_error_about_half_probabilities_is_explained(precision: Any) -> None:
    class Policy(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            chances = (8 * self(batch[0])).softmax(-1)
            return -Categorical(chances, validate_args=True).log_prob(batch[1]).mean()  # torch.compile turns it off

    with pytest.raises(ValueError, match="Simplex") as raised:
        fit(Policy(mlp()), classification(1, size=2048), MasterWeightPrecision(precision))  # one row in fifty
    assert any("probabilities that sum to 1, takes x.float()" in note for note in raised.value.__notes__)


def test_predict_before_fit_leaves_training_as_it_is() -> None:
    class Predicts(Classifier):
        def predict_step(self, batch: Any) -> Tensor:
            return self(batch[0])

    runs = []
    for predicts in (False, True):
        module = Predicts(mlp())
        ours: L.Trainer = trainer(MasterWeightPrecision("16-true"))
        if predicts:
            (first,) = ours.predict(module, loader(classification(1))) or []
            assert first.dtype == torch.float16
        ours.fit(module, loader(classification(5)))
        runs.append(module.losses)
    assert runs[0] == runs[1]
    assert F.mse_loss(first.float(), mlp()(classification(1)[0][0])) < 1e-5
