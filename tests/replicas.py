"""What each of two ranks does in `test_ddp.py`: several small trainings, one after the other."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.fabric import Fabric
from lightning.pytorch.strategies import DDPStrategy
from ranks import TWO
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from training import Classifier, adamw, classification, loader, mlp, trainer

from lightning_mpt import DynamicLossScale, FabricMasterWeightPrecision, MasterWeightPrecision

STEPS = 6


class PerRank(Classifier):
    """Keeps, after each step, the first parameter; on one rank a batch may be poisoned."""

    def __init__(self, net: nn.Module, *, poisoned: int | None = None, **options: Any) -> None:
        super().__init__(net, **options)
        self.seen: list[Tensor] = []
        self._poisoned = poisoned

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        out = self(x)
        if batch_idx == self._poisoned:
            out = out * float("inf")
        return F.cross_entropy(out, y)

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(next(self.net.parameters()).detach().clone())


class OnTheWire(Classifier):
    """Counts the bytes that are reduced, and looks whether gradients lie in the buckets."""

    def on_train_start(self) -> None:
        self.wire: dict[torch.dtype, int] = {}
        self.views: list[bool] = []
        self._buckets: set[int] = set()
        self.trainer.strategy.model.register_comm_hook(None, self._reduce)

    def _reduce(self, _: Any, bucket: torch.distributed.GradBucket) -> torch.futures.Future[Tensor]:
        flat = bucket.buffer()
        self.wire[flat.dtype] = self.wire.get(flat.dtype, 0) + flat.nbytes
        self._buckets.add(flat.untyped_storage().data_ptr())
        return allreduce_hook(None, bucket)

    def on_before_backward(self, *_: Any) -> None:
        self._buckets.clear()

    def on_after_backward(self) -> None:
        if self._buckets:  # else the batch is one of several, and not the last
            places = {parameter.grad.untyped_storage().data_ptr() for parameter in self.parameters()}
            self.views.append(places <= self._buckets)


class ClipsByItself(Classifier):
    """Clips its true gradients between backward and the step."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.5)


def batches_of(rank: int, count: int = STEPS) -> list[tuple[Tensor, ...]]:
    """Every second batch."""
    return classification(2 * count)[rank::2]


def net(rank: int) -> nn.Module:
    """The same shape on every rank, with other weights: the first rank's are to be everyone's."""
    made = mlp()
    generator = torch.Generator().manual_seed(rank)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return made


def train(
    rank: int, plugin: MasterWeightPrecision | None, module: Classifier, *, views: bool = False, **options: Any
) -> dict[str, Any]:
    """Train under DDP. The state of the module, inside `fit` FP32 masters, is what comes back."""
    ours = trainer(plugin, strategy=DDPStrategy(gradient_as_bucket_view=views), **TWO, **options)
    ours.fit(module, loader(batches_of(rank, options.get("accumulate_grad_batches", 1) * STEPS)))
    skipped = plugin.skipped_steps if plugin else 0
    scale = plugin.loss_scale if plugin else 1.0
    return {"weights": module.net.state_dict(), "skipped": skipped, "scale": scale, "seen": getattr(module, "seen", [])}


def everything(rank: int, folder: Path) -> dict[str, Any]:
    """All that `test_ddp.py` looks at."""
    results: dict[str, Any] = {}
    for accumulated in (1, 4):
        options: dict[str, Any] = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 1.0}
        results[f"32-true, {accumulated}"] = train(rank, None, Classifier(net(rank)), **options)
        for precision in ("bf16-true", "16-true"):
            plugin = MasterWeightPrecision(precision)
            results[f"{precision}, {accumulated}"] = train(rank, plugin, Classifier(net(rank)), **options)
            module = OnTheWire(net(rank))
            case = train(rank, MasterWeightPrecision(precision), module, views=True, **options)
            results[f"views, {precision}, {accumulated}"] = {**case, "wire": module.wire, "views": module.views}
    for precision in (None, "bf16-true", "16-true"):
        plugin = None if precision is None else MasterWeightPrecision(precision)
        results[f"clips, {precision}"] = train(rank, plugin, ClipsByItself(net(rank)))
    plugin = MasterWeightPrecision("bf16-true", master_weights="split8", optimizer_state="8bit")
    results["compact"] = train(rank, plugin, Classifier(net(rank)))
    plugin = MasterWeightPrecision("16-true", loss_scale=DynamicLossScale(2.0**10))
    results["poisoned"] = train(rank, plugin, PerRank(net(rank), poisoned=2 if rank == 1 else None))
    results["sgd"] = train(
        rank, MasterWeightPrecision("16-true"), Classifier(net(rank), lambda m: torch.optim.SGD(m.parameters(), 0.1))
    )
    results["resumed"] = resumed(rank, folder)
    results["fabric"] = in_fabric(rank)
    try:
        train(rank, MasterWeightPrecision("bf16-true", gradient_release=True), Classifier(net(rank)))
    except ValueError as refused:
        results["released"] = str(refused)
    return results


def in_fabric(rank: int) -> dict[str, Any]:
    """What the Trainer does in the case `bf16-true, 1`, in a loop of one's own."""
    plugin = FabricMasterWeightPrecision("bf16-true")
    fabric = Fabric(strategy="ddp", accelerator=TWO["accelerator"], devices=2, plugins=[plugin])
    fabric.launch()
    module = net(rank)
    model, optimizer = fabric.setup(module, torch.optim.AdamW(module.parameters(), lr=1e-2))
    for x, y in batches_of(rank):
        fabric.backward(F.cross_entropy(model(x), y))
        fabric.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
        optimizer.zero_grad()
    plugin.restore()
    return {"weights": module.state_dict()}


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    """A run of two epochs, and one that was stopped after the first and goes on from its file."""
    path = folder / "after-one-epoch.ckpt"

    def start(epochs: int, ckpt_path: str | None) -> tuple[Any, Classifier]:
        module = Classifier(net(rank), adamw(1e-2))
        plugin = MasterWeightPrecision("16-true", loss_scale=DynamicLossScale(2.0**8, growth_interval=4))
        ours = trainer(plugin, strategy="ddp", **TWO, max_epochs=epochs)
        ours.fit(module, loader(batches_of(rank)), ckpt_path=ckpt_path, weights_only=True)
        return ours, module

    first, _ = start(1, None)
    first.save_checkpoint(path)
    torch.distributed.barrier()
    _, stopped = start(2, str(path))
    _, whole = start(2, None)
    return {"stopped": copy.deepcopy(stopped.net.state_dict()), "whole": whole.net.state_dict()}
