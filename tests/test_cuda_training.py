"""Training on a GPU through the Trainer: nothing waits for the device, skipped steps, resuming, compiling, NCCL."""

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from training import Classifier, classification, fit, loader, mlp, trainer

from lightning_mpt import DynamicLossScale, MasterWeightPrecision
from lightning_mpt.profiler import Category, MemoryProfiler

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning"),
]
CUDA: dict[str, Any] = {"accelerator": "cuda", "devices": 1}
IN_ORDER = {**CUDA, "use_distributed_sampler": False}
"""The distributed one shuffles."""


class Silent(Classifier):
    """Asks nothing of the device while it trains. `bad` are batches whose loss is inf."""

    bad: tuple[int, ...] = ()
    wait_is_error = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        return loss * torch.inf if batch_idx in self.bad else loss

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, closure: Any = None) -> None:
        mode = torch.cuda.get_sync_debug_mode()
        if self.wait_is_error and batch_idx > 1:  # the first step compiles the kernels
            torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step(closure=closure)
        finally:
            torch.cuda.set_sync_debug_mode(mode)


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_forward_backward_and_step_never_wait_for_the_device(precision: Any, clip: float | None) -> None:
    module = Silent(mlp())
    module.wait_is_error = True
    before = [parameter.detach().clone() for parameter in module.parameters()]
    fit(module, classification(8), MasterWeightPrecision(precision), gradient_clip_val=clip, **CUDA)
    after = [parameter.detach().cpu() for parameter in module.parameters()]
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def scheduled(module: L.LightningModule) -> Any:
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_skipped_steps_are_counted_and_schedules_make_up_for_them(precision: Any) -> None:
    module = Silent(mlp(), scheduled)
    module.bad = (2, 3)
    plugin = MasterWeightPrecision(precision)
    ours = fit(module, classification(12), plugin, **CUDA)
    assert plugin.skipped_steps == 2
    assert ours.lr_scheduler_configs[0].scheduler.last_epoch == 10
    state = ours.optimizers[0].state
    assert all(int(state[parameter]["step"]) == 10 for parameter in module.parameters())
    assert all(parameter.dtype == torch.float32 and parameter.isfinite().all() for parameter in module.parameters())


@pytest.mark.parametrize(
    "storage", [{}, {"master_weights": "split8", "optimizer_state": "8bit"}], ids=["exact", "lossy"]
)
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(storage: dict[str, Any], tmp_path: Path) -> None:
    def plugin() -> MasterWeightPrecision:
        return MasterWeightPrecision("16-true", loss_scale=DynamicLossScale(2.0**20, growth_interval=3), **storage)

    unbroken, broken, resumed = (Classifier(mlp()) for _ in range(3))
    batches = classification(6)
    fit(unbroken, batches, plugin(), max_epochs=2, **CUDA)
    first = trainer(plugin(), **CUDA)
    first.fit(broken, loader(batches))
    first.save_checkpoint(tmp_path / "half.ckpt")
    trainer(plugin(), max_epochs=2, **CUDA).fit(resumed, loader(batches), ckpt_path=tmp_path / "half.ckpt")
    for one, other in zip(unbroken.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_fp16_gradients_that_accumulate_lose_nothing_against_fp32() -> None:
    fp32 = Classifier(mlp())
    ours = copy.deepcopy(fp32)
    fit(fp32, classification(64), accumulate_grad_batches=4, **CUDA)
    fit(ours, classification(64), MasterWeightPrecision("16-true"), accumulate_grad_batches=4, **CUDA)
    gone = sum((a - b).square().sum() for a, b in zip(fp32.net.parameters(), mlp().parameters(), strict=True))
    off = sum((a - b).square().sum() for a, b in zip(fp32.net.parameters(), ours.net.parameters(), strict=True))
    assert (off / gone).sqrt().item() <= 0.15


@pytest.mark.filterwarnings("ignore")  # the compiler's own, of what it uses
def test_a_compiled_network_trains_as_in_fp32() -> None:
    fp32, ours = Classifier(mlp()), Classifier(torch.compile(mlp()))
    fit(fp32, classification(60), **CUDA)
    fit(ours, classification(60), MasterWeightPrecision("bf16-true"), **CUDA)
    assert sum(ours.losses[-10:]) == pytest.approx(sum(fp32.losses[-10:]), rel=0.15)


# Lightning makes the DistributedDataParallel on a stream of its own.
@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream does not match:UserWarning")
def test_ddp_of_one_rank_over_nccl() -> None:
    alone, ranked = Classifier(mlp()), Classifier(mlp())
    fit(alone, classification(8), MasterWeightPrecision("16-true"), **CUDA)
    fit(ranked, classification(8), MasterWeightPrecision("16-true"), strategy="ddp", **IN_ORDER)
    for one, other in zip(alone.parameters(), ranked.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


class Sharded(Classifier):
    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def test_fsdp2_of_one_rank_over_nccl() -> None:
    alone, ranked = Classifier(mlp()), Sharded(mlp())
    fit(alone, classification(8), MasterWeightPrecision("bf16-true"), **CUDA)
    strategy = ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=1)
    fit(ranked, classification(8), MasterWeightPrecision("bf16-true"), strategy=strategy, **IN_ORDER)
    assert ranked.losses == pytest.approx(alone.losses, rel=0.05)


class Greedy(Classifier):
    """Asks for a terabyte in its third step."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if batch_idx == 2:
            torch.empty(2**40, dtype=torch.uint8, device=self.device)
        return super().training_step(batch, batch_idx)


def test_out_of_memory_prints_the_table_of_that_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    profiler = MemoryProfiler(warmup_steps=1, steps=3)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        fit(Greedy(mlp()), classification(8), MasterWeightPrecision("16-true"), profiler=profiler, **CUDA)
    report = profiler.out_of_memory_report
    assert report is not None
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.categories[Category.OPTIMIZER_STATE] > 0
    assert "1.00 TiB more was asked for" in capsys.readouterr().err
    assert not torch._C._cuda_isHistoryEnabled()


def test_the_module_and_the_switches_are_what_they_were() -> None:
    matmul = torch.backends.cuda.matmul
    before = (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction)
    module = Classifier(nn.Sequential(mlp(), nn.BatchNorm1d(4)))
    fit(module, classification(4), MasterWeightPrecision("16-true"), **CUDA)
    assert (matmul.allow_fp16_reduced_precision_reduction, matmul.allow_bf16_reduced_precision_reduction) == before
    assert {tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point()} == {torch.float32}
    assert torch.get_default_dtype() == torch.float32
