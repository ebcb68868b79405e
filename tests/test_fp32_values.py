"""Copies that are made of a half module in training: FP32 for whoever saves them, with what is theirs and no more."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from lightning_mpt import MasterWeightPrecision
from lightning_mpt.conversion import ConvertedModule
from lightning_mpt.masters import MasterWeights
from tests.training import Classifier, classification, fit, mlp

HALVES = ("16-true", "bf16-true")


class Net(nn.Module):
    """Two parts, one of which is large; tied weights, and buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8))
        self.small[1].weight = self.small[0].weight
        self.small.register_buffer("table", torch.linspace(0, 1, 7).sin())
        self.large = nn.Linear(300, 300)
        self.unpicklable: Any = None


def through_pickle(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def through_torch(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


COPIES = pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])


def assert_same(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0)


@COPIES
def test_a_copy_has_the_fp32_values_and_goes_its_own_way(copied: Callable[[nn.Module], Any]) -> None:
    net = Net()
    before = copy.deepcopy(net.state_dict())
    ConvertedModule(net, torch.bfloat16, MasterWeights())
    twin = copied(net)
    assert twin.small[0].weight.dtype == torch.bfloat16
    assert twin.small[0].weight is twin.small[1].weight
    assert_same(twin.state_dict(), before)
    with torch.no_grad():
        twin.small[0].weight.fill_(2)
        twin.small.table.fill_(3)
    assert_same(net.state_dict(), before)
    assert_same(twin.state_dict()["small.1.weight"], torch.full((8, 8), 2.0))
    assert_same(twin.state_dict()["small.table"], torch.full((7,), 3.0))
    twin.load_state_dict(before)
    assert_same(twin.state_dict(), before)
    assert_same(copied(twin).state_dict(), before)


@COPIES
def test_a_copy_of_a_part_takes_along_what_is_the_parts(copied: Callable[[nn.Module], Any]) -> None:
    net = Net()
    before = copy.deepcopy(net.small.state_dict())
    masters = MasterWeights()
    ConvertedModule(net, torch.bfloat16, masters)
    net.unpicklable = lambda: None
    assert_same(copied(net.small).state_dict(), before)
    assert len(pickle.dumps(net.small)) < 300 * 300
    memo: dict[int, Any] = {}
    copy.deepcopy(net.small, memo)
    stored = {id(tensor) for _, tensor in masters}
    assert id(net.large) not in memo
    assert id(net.large.weight) not in memo
    assert not stored & set(memo)


class Taught(Classifier):
    """A teacher is copied when training starts; another module is made, in half, since that is the default then."""

    def on_train_start(self) -> None:
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.start = copy.deepcopy(self.net.state_dict())
        with torch.device(self.device):
            self.added = nn.BatchNorm1d(4, dtype=torch.get_default_dtype())

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        if batch_idx == 0:
            self.made = nn.Linear(2, 2)
        loss = super().training_step(batch, batch_idx)
        assert loss is not None
        return loss + (self(batch[0]) - self.teacher(batch[0])).square().mean()


@pytest.mark.parametrize("precision", HALVES)
def test_what_is_added_in_training_is_fp32_in_files_and_after_fit(precision: Any, tmp_path: Path) -> None:
    module = Taught(mlp())
    file = tmp_path / "in_fit.ckpt"

    class Saves(Taught):
        def on_train_epoch_end(self) -> None:
            assert self.teacher[0].weight.dtype != torch.float32
            assert self.made.weight.dtype != torch.float32
            self.trainer.save_checkpoint(file)

    module.__class__ = Saves
    fit(module, classification(3), MasterWeightPrecision(precision))
    saved = torch.load(file, weights_only=True)["state_dict"]
    assert {value.dtype for value in saved.values() if value.is_floating_point()} == {torch.float32}
    assert_same({name: saved[f"teacher.{name}"] for name in module.start}, module.start)
    assert_same(dict(module.teacher.state_dict()), dict(module.start))
    assert_same(module.made.state_dict(), {name: saved[f"made.{name}"] for name in module.made.state_dict()})
    tensors = [*module.parameters(), *module.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float32}
    assert not any(part._state_dict_hooks or part._load_state_dict_pre_hooks for part in module.modules())
    assert module.teacher(classification(1)[0][0]).dtype == torch.float32


def test_an_export_in_training_is_fp32(tmp_path: Path) -> None:
    class Exports(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = GPT2LMHeadModel(GPT2Config(vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=1))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.model(batch[0], labels=batch[0]).loss

        def on_train_epoch_end(self) -> None:
            with self.trainer.precision_plugin.fp32_values():  # type: ignore[attr-defined]
                self.model.save_pretrained(tmp_path)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Exports()
    fit(module, [(torch.arange(8)[None],)] * 3, MasterWeightPrecision("bf16-true"))
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float32
    assert_same(dict(loaded.state_dict()), dict(module.model.state_dict()))
