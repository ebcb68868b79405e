"""Options together: random configurations train like FP32, or are refused with a documented reason.

A seed is a configuration, so a failure comes back with `-k "[17]"`, and its configuration is printed.
"""

import copy
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from test_bridge import Lion
from torch import Tensor, nn
from torch.optim import lr_scheduler
from training import Classifier, classification, fit

from lightning_mpt import ConstantLossScale, DynamicLossScale, MasterWeightPrecision
from lightning_mpt.storage import MASTER_STORAGES, MOMENT_STORAGES

CONFIGURATIONS, QUICK = 200, 25
EPOCHS, BATCHES, HELD_OUT = 2, 6, 1
LEAST_COSINE = 0.95
"""Between the ways that the weights went, ours and FP32's. Worst seen 0.981."""
MOST_LOSS = {"rel": 0.1, "abs": 1e-2}
"""More of the held-out loss than FP32 training ends with: a share of what that gains (worst seen 0.028), and what few
steps by the sign of gradients, as RMSprop's first ones are, leave to rounding (worst seen 0.006, by bf16 LSTMs)."""


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.unflatten(1, (4, 4)))[0][:, -1])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.gelu(self.second(F.gelu(self.first(x)))))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 32), nn.LayerNorm(32), nn.GELU(), nn.Linear(32, 4))


def convnet() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 4),
    )  # fmt: skip


def frozen() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(16, 16), *mlp())
    net[0].requires_grad_(False)
    return net


NETS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "convnet": convnet,
    "lstm": LSTM,
    "tied": Tied,
    "frozen": frozen,
}

OPTIMIZERS: dict[str, tuple[Callable[..., torch.optim.Optimizer], dict[str, list[Any]]]] = {
    "AdamW": (torch.optim.AdamW, {"lr": [1e-2], "amsgrad": [False, True], "weight_decay": [0.0, 0.1]}),
    "Adam": (torch.optim.Adam, {"lr": [1e-2], "amsgrad": [False, True], "weight_decay": [0.0, 0.1]}),
    "SGD": (torch.optim.SGD, {"lr": [0.1], "momentum": [0.0, 0.9]}),
    "Lion": (Lion, {"lr": [3e-3]}),
    "RMSprop": (torch.optim.RMSprop, {"lr": [1e-2], "centered": [False, True]}),
    "NAdam": (torch.optim.NAdam, {"lr": [1e-2]}),
}
WAYS = [{}, {"foreach": True}, {"foreach": False}, {"fused": True}]

SCHEDULERS: dict[str, tuple[Callable[..., Any], str]] = {
    "linear": (lambda optimizer: lr_scheduler.LinearLR(optimizer, 1.0, 0.5, total_iters=4), "step"),
    "cosine": (lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=24), "step"),
    "steps": (lambda optimizer: lr_scheduler.StepLR(optimizer, 1, gamma=0.5), "epoch"),
    "exponential": (lambda optimizer: lr_scheduler.ExponentialLR(optimizer, 0.9), "epoch"),
    "plateau": (lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, threshold=1.0), "epoch"),
}
LOSS_SCALES: dict[str, Any] = {
    "auto": "auto",
    "dynamic": "dynamic",
    "none": None,
    "number": 128.0,
    "constant": ConstantLossScale(64.0),
    "growing": DynamicLossScale(init_scale=256.0, growth_interval=2),
}
FP32_MODULES: dict[str, Any] = {"default": None, "LayerNorm": nn.LayerNorm, "Linear": [nn.Linear], "none": ()}


@dataclass(frozen=True)
class Configuration:
    net: str
    optimizer: str
    arguments: tuple[tuple[str, Any], ...]
    scheduler: str | None
    clip: str | None
    accumulate: int
    # What FP32 training knows nothing of:
    precision: str
    loss_scale: str
    master_weights: str
    optimizer_state: str
    gradient_release: bool
    fp32_modules: str

    @classmethod
    def drawn(cls, seed: int) -> "Configuration":
        draw = random.Random(seed)
        optimizer = draw.choice(list(OPTIMIZERS))
        ways = WAYS if optimizer in ("AdamW", "Adam", "SGD") else WAYS[:3] if optimizer != "Lion" else WAYS[:1]
        arguments = {name: draw.choice(values) for name, values in OPTIMIZERS[optimizer][1].items()}
        return cls(
            net=draw.choice(list(NETS)),
            optimizer=optimizer,
            arguments=tuple({**arguments, **draw.choice(ways)}.items()),
            scheduler=draw.choice([None, *SCHEDULERS]),
            clip=draw.choice([None, "norm", "value"]),
            accumulate=draw.choice([1, 1, 2, 4]),
            precision=draw.choice(["16-true", "bf16-true"]),
            loss_scale=draw.choice(list(LOSS_SCALES)),
            master_weights=draw.choice(list(MASTER_STORAGES)),
            optimizer_state=draw.choice(list(MOMENT_STORAGES)),
            gradient_release=draw.random() < 0.25,
            fp32_modules=draw.choice(list(FP32_MODULES)),
        )

    @property
    def reason_to_refuse(self) -> str | None:
        """What the documentation says of gradient release."""
        if not self.gradient_release:
            return None
        if self.loss_scale in ("dynamic", "growing") or (self.loss_scale == "auto" and self.precision == "16-true"):
            return r"gradient_release=True cannot be with loss_scale=.*dynamic"
        if self.accumulate > 1:
            return r"gradient_release=True cannot be with accumulate_grad_batches=\d"
        if self.clip == "norm":
            return r"gradient_release=True cannot be with gradient_clip_val=.* by norm"
        return None if self.optimizer in ("Adam", "AdamW") else "gradient_release=True is for a single AdamW or Adam"

    def plugin(self) -> MasterWeightPrecision:
        own = {name: getattr(self, name) for name in ("master_weights", "optimizer_state", "gradient_release")}
        scale, modules = copy.deepcopy(LOSS_SCALES[self.loss_scale]), FP32_MODULES[self.fp32_modules]
        return MasterWeightPrecision(self.precision, loss_scale=scale, fp32_modules=modules, **own)  # type: ignore[arg-type]

    @property
    def in_fp32(self) -> tuple[Any, ...]:
        """What FP32 training needs to know."""
        return tuple(getattr(self, field.name) for field in fields(self))[:6]


class Trained(Classifier):
    def __init__(self, configuration: Configuration) -> None:
        torch.manual_seed(0)
        super().__init__(NETS[configuration.net]())
        self.configuration = configuration

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.configuration.optimizer][0](self.parameters(), **dict(self.configuration.arguments))
        if self.configuration.scheduler is None:
            return optimizer
        make, interval = SCHEDULERS[self.configuration.scheduler]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": make(optimizer), "interval": interval, "monitor": "loss"},
        }


def train(configuration: Configuration, plugin: MasterWeightPrecision | None) -> tuple[Trained, L.Trainer]:
    module = Trained(configuration)
    trainer = fit(
        module, classification(BATCHES), plugin, max_epochs=EPOCHS, accumulate_grad_batches=configuration.accumulate,
        gradient_clip_val={None: None, "norm": 0.5, "value": 0.05}[configuration.clip],
        gradient_clip_algorithm=configuration.clip,
    )  # fmt: skip
    return module, trainer


@functools.cache
def trained_in_fp32(net: str, *rest: Any) -> tuple[Trained, L.Trainer]:
    unimportant = ["16-true", "auto", "split", "float32", False, "default"]
    return train(Configuration(net, *rest, *unimportant), None)


def weights(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def held_out_loss(module: Trained) -> float:
    x, y = classification(BATCHES + HELD_OUT)[-1]
    with torch.no_grad():
        return F.cross_entropy(module.eval()(x), y).item()


@pytest.mark.filterwarnings("ignore:fp32_modules=.* takes the place of the norms")  # with LayerNorm alone it does
@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.slow] if seed >= QUICK else []) for seed in range(CONFIGURATIONS)]
)
def test_it_trains_as_in_fp32_or_is_refused_with_the_reason(seed: int) -> None:
    configuration = Configuration.drawn(seed)
    print(configuration)
    if configuration.reason_to_refuse is not None:
        with pytest.raises(ValueError, match=configuration.reason_to_refuse):
            train(configuration, configuration.plugin())
        return
    fp32, fp32_trainer = trained_in_fp32(*configuration.in_fp32)
    plugin = configuration.plugin()
    ours, trainer = train(configuration, plugin)
    assert plugin.skipped_steps == 0
    assert {value.dtype for value in ours.state_dict().values() if value.is_floating_point()} == {torch.float32}
    assert all(value.isfinite().all() for value in ours.state_dict().values())
    assert trainer.global_step == fp32_trainer.global_step
    assert [g["lr"] for g in trainer.optimizers[0].param_groups] == [
        g["lr"] for g in fp32_trainer.optimizers[0].param_groups
    ]
    start = Trained(configuration)
    cosine = F.cosine_similarity(weights(ours) - weights(start), weights(fp32) - weights(start), dim=0)
    before, after, fp32_after = map(held_out_loss, (start, ours, fp32))
    assert cosine > LEAST_COSINE
    assert after < fp32_after + MOST_LOSS["rel"] * abs(before - fp32_after) + MOST_LOSS["abs"]
