"""What each of two ranks does in `test_fsdp2.py`: several small trainings whose parameters are sharded over both."""

import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import ModelParallelStrategy as FabricModelParallelStrategy
from lightning.pytorch.strategies import ModelParallelStrategy
from ranks import TWO
from replicas import PerRank, batches_of, net
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from training import Configure, adamw, loader, trainer

from lightning_mpt import DynamicLossScale, FabricMasterWeightPrecision, MasterWeightPrecision


class Sharded(PerRank):
    """Each layer's parameters are sharded; what is needed is there in `seen`, whole."""

    def __init__(self, network: nn.Module, configure: Configure | None = None, **options: Any) -> None:
        super().__init__(network, configure=configure or adamw(), **options)
        self.inside: dict[str, Any] = {}

    def configure_model(self) -> None:
        if any(isinstance(parameter, DTensor) for parameter in self.net.parameters()):
            return
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def on_train_batch_end(self, *_: Any) -> None:
        self.kept = self.net.state_dict()  # kept alive: must not be what a later step is saved as
        self.seen.append(whole(next(self.net.parameters())))

    def on_train_end(self) -> None:
        optimizer = self.trainer.optimizers[0]
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, MasterWeightPrecision):
            self.inside["saved"] = {name: whole(value) for name, value in self.net.state_dict().items()}
            masters = plugin.master_params(optimizer)
            self.inside["masters"] = [whole(master) for master in masters]
            self.inside["sharded"] = all(isinstance(master, DTensor) for master in masters)
            self.inside["grad_norm"] = plugin.grad_norm
        held = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        self.inside["state_numel"] = sum(t.numel() for t in held if t.dim())


class Keeps(L.Callback):
    """All that a checkpoint is of, whole: as it was before the first step, a file loaded, and as it was in the end."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.first = self._state(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.last = self._state(trainer)

    def _state(self, trainer: L.Trainer) -> dict[str, Any]:
        (optimizer,), plugin = trainer.optimizers, trainer.precision_plugin
        if not isinstance(plugin, MasterWeightPrecision):
            return {}
        state = optimizer.state_dict()["state"]
        return {
            "weights": [whole(parameter) for parameter in trainer.lightning_module.parameters()],
            "masters": [whole(master) for master in plugin.master_params(optimizer)],
            "state": {i: {name: whole(value) for name, value in entry.items()} for i, entry in state.items()},
            "plugin": plugin.state_dict(),
        }


class WithBatchNorm(Sharded):
    """A convolution and a linear layer, each with BatchNorm, sharded with the rest or each on its own."""

    def __init__(self, *, norms_on_their_own: bool) -> None:
        super().__init__(batchnorm_net())
        self._norms_on_their_own = norms_on_their_own

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for layer in self.net:
            if self._norms_on_their_own and isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
                fully_shard(layer, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class ConvolutionAndNorm(WithBatchNorm):
    """The convolution and its BatchNorm in one call, as a list."""

    def configure_model(self) -> None:
        fully_shard([self.net[1], self.net[2]], mesh=self.device_mesh["data_parallel"])
        super().configure_model()


def batchnorm_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(128, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4),
    )  # fmt: skip


def with_batchnorm(rank: int, folder: Path) -> dict[str, Any]:
    """BatchNorm, which the plugin keeps FP32."""
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    _, results["32-true"] = train(rank, None, WithBatchNorm(norms_on_their_own=True))
    for precision in ("bf16-true", "16-true"):
        plugin = MasterWeightPrecision(precision)
        _, results[precision] = train(rank, plugin, WithBatchNorm(norms_on_their_own=True))
    plugin = MasterWeightPrecision("bf16-true", fp32_modules=())
    _, results["in half"] = train(rank, plugin, WithBatchNorm(norms_on_their_own=False))
    for name, kind in (("refused", WithBatchNorm), ("refused in a list", ConvolutionAndNorm)):
        try:
            train(rank, MasterWeightPrecision("bf16-true"), kind(norms_on_their_own=False))
        except ValueError as refused:
            results[name] = str(refused)
    return results


class ClipsByItself(Sharded):
    """What `gradient_clip_val=0.1` does, by hand."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class LastLayerWhole(Sharded):
    """Only the other layers are sharded. On the second rank, the third gradient of the last bias is inf."""

    def configure_model(self) -> None:
        for layer in self.net[:-1]:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=self.device_mesh["data_parallel"])

    def backward(self, loss: torch.Tensor) -> None:
        super().backward(loss)
        if self.global_rank == 1 and len(self.seen) == 2:
            self.net[-1].bias.grad.fill_(float("inf"))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def train(
    rank: int,
    plugin: MasterWeightPrecision | None,
    module: Sharded,
    *,
    ckpt_path: Path | None = None,
    sharded_file: bool = False,
    **options: Any,
) -> tuple[Any, dict[str, Any]]:
    steps = options.get("accumulate_grad_batches", 1) * 6
    strategy = ModelParallelStrategy(
        data_parallel_size=options.get("devices", 2), tensor_parallel_size=1, save_distributed_checkpoint=sharded_file
    )
    keeps = Keeps()
    ours = trainer(plugin, strategy=strategy, **{**TWO, **options}, callbacks=[keeps])
    ours.fit(module, loader(batches_of(rank, steps)), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return ours, {
        "weights": {name: whole(value) for name, value in module.net.state_dict().items()},
        "skipped": plugin.skipped_steps if plugin else 0,
        "scale": plugin.loss_scale if plugin else 1.0,
        "seen": module.seen,
        "first": keeps.first,
        "last": keeps.last,
        **module.inside,
    }


def everything(rank: int, folder: Path) -> dict[str, Any]:
    """All that `test_fsdp2.py` looks at."""
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    for accumulated in (1, 4):
        options: dict[str, Any] = {"accumulate_grad_batches": accumulated}
        _, results[f"32-true, {accumulated}"] = train(rank, None, Sharded(net(0)), **options)
        for precision in ("bf16-true", "16-true"):
            plugin = MasterWeightPrecision(precision)
            _, results[f"{precision}, {accumulated}"] = train(rank, plugin, Sharded(net(0)), **options)
    plugin = MasterWeightPrecision("bf16-true")
    _, results["clipped"] = train(rank, plugin, Sharded(net(0)), gradient_clip_val=0.1)
    _, results["clips by itself"] = train(rank, MasterWeightPrecision("bf16-true"), ClipsByItself(net(0)))
    _, results["compact"] = train(rank, compact(), Sharded(net(0)))
    plugin = MasterWeightPrecision("16-true", loss_scale=DynamicLossScale(2.0**10))
    _, results["poisoned"] = train(rank, plugin, Sharded(net(0), poisoned=2 if rank == 1 else None))
    plugin = MasterWeightPrecision("16-true", loss_scale=DynamicLossScale(2.0**10))
    _, results["poisoned, one gradient"] = train(rank, plugin, LastLayerWhole(net(0)))
    sgd = Sharded(net(0), lambda module: torch.optim.SGD(module.parameters(), 0.1, momentum=0.9))
    _, results["sgd"] = train(rank, MasterWeightPrecision("16-true"), sgd)
    try:
        train(rank, MasterWeightPrecision("bf16-true", gradient_release=True), Sharded(net(0)))
    except ValueError as refused:
        results["released"] = str(refused)

    # Saved by both ranks, gone on with by both; the files are for one rank too.
    for sharded_file in (False, True):
        path, name = folder / FILES[sharded_file], "sharded" if sharded_file else "whole"
        first, results[f"saved, {name}"] = train(rank, scaled(), Sharded(net(0)), sharded_file=sharded_file)
        first.save_checkpoint(path)
        torch.distributed.barrier()
        _, stopped = train(rank, scaled(), Sharded(net(1)), ckpt_path=path, sharded_file=sharded_file, max_epochs=2)
        results[f"stopped, {name}"] = stopped
    _, results["never stopped"] = train(rank, scaled(), Sharded(net(0)), max_epochs=2)
    for name in ("one rank", "one rank, compact"):
        one, plugin = folder / f"{name}.ckpt", compact() if "compact" in name else scaled()
        if one.exists():
            _, results[f"from {name}"] = train(rank, plugin, Sharded(net(1)), ckpt_path=one, max_epochs=2)
    for sharded_file in (False, True):
        in_fabric(rank, folder, results, sharded_file=sharded_file)
    return results


class FabricLoop:
    """A loop of one's own; its model is sharded layer by layer."""

    def __init__(self, network: nn.Module, precision: Any, *, sharded_file: bool = False) -> None:
        def shard(module: nn.Module, mesh: Any) -> nn.Module:
            for layer in module:
                if isinstance(layer, nn.Linear):
                    fully_shard(layer, mesh=mesh["data_parallel"])
            return fully_shard(module, mesh=mesh["data_parallel"])

        strategy = FabricModelParallelStrategy(shard, 2, 1, save_distributed_checkpoint=sharded_file)
        self.plugin = FabricMasterWeightPrecision(precision)
        self.fabric = Fabric(accelerator=TWO["accelerator"], strategy=strategy, devices=2, plugins=[self.plugin])
        self.fabric.launch()
        self.module = network
        self.model = self.fabric.setup_module(network)
        self.optimizer = self.fabric.setup_optimizers(torch.optim.AdamW(self.model.parameters(), lr=1e-2))

    def train(self, rank: int) -> "FabricLoop":
        for x, y in batches_of(rank):
            self.fabric.backward(torch.nn.functional.cross_entropy(self.model(x), y))
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self

    @property
    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "precision": self.plugin}

    def state(self) -> dict[str, Any]:
        """What a file should hold, whole."""
        moments = [
            [whole(value) for value in entry.values()] for entry in self.optimizer.state_dict()["state"].values()
        ]
        masters = [whole(master) for master in self.plugin.master_params(self.optimizer)]
        return {"masters": masters, "moments": moments, "plugin": self.plugin.state_dict()}


def in_fabric(rank: int, folder: Path, results: dict[str, Any], *, sharded_file: bool) -> None:
    """What the Trainer does in the cases `bf16-true, 1` and `16-true, 1`; a file of it, loaded."""
    for precision in ("bf16-true", "16-true"):
        loop = FabricLoop(net(0), precision, sharded_file=sharded_file).train(rank)
        loop.fabric.save(folder / f"fabric {sharded_file}.ckpt", loop.parts)
        other = FabricLoop(net(1), precision, sharded_file=sharded_file)
        other.fabric.load(folder / f"fabric {sharded_file}.ckpt", other.parts)
        case = {"saved": loop.state(), "loaded": other.state()}
        loop.plugin.restore()
        case["weights"] = {name: whole(value) for name, value in loop.module.state_dict().items()}
        results[f"fabric, {precision}, {sharded_file}"] = case
    try:
        FabricLoop(batchnorm_net(), "bf16-true")
    except ValueError as refused:
        results["fabric refused"] = str(refused)


FILES = ("two-ranks.ckpt", "sharded.ckpt")


def scaled() -> MasterWeightPrecision:
    """With a loss scale that a file remembers."""
    return MasterWeightPrecision("16-true", loss_scale=DynamicLossScale(2.0**8, growth_interval=4))


def compact() -> MasterWeightPrecision:
    return MasterWeightPrecision("bf16-true", master_weights="split8", optimizer_state="8bit")


def one_of_two(rank: int, folder: Path) -> dict[str, Any]:
    """A single rank goes on from what two have saved, its parameters sharded over itself."""
    warnings.simplefilter("ignore")
    return {
        name: train(
            rank,
            scaled(),
            Sharded(net(1)),
            ckpt_path=folder / file,
            sharded_file=name == "sharded",
            max_epochs=2,
            devices=1,
        )[1]
        for name, file in zip(("whole", "sharded"), FILES, strict=True)
    }
