"""A checkpoint is an ordinary FP32 one: what is in the file, who can load it, and whose files are loaded."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from training import Classifier, adamw, classification, fit, loader, mlp, trainer

from lightning_mpt import PRESETS, DynamicLossScale, MasterWeightPrecision
from lightning_mpt.storage import MASTER_STORAGES, MOMENT_STORAGES

PRECISIONS = ("16-true", "bf16-true")


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.LayerNorm(12), nn.Linear(12, 4))


class Model(Classifier):
    """One that can be made from its file alone."""

    def __init__(self, width: int = 12) -> None:
        super().__init__(net())
        self.save_hyperparameters()


def tensors(entry: Any) -> list[Tensor]:
    """All tensors in a nest of dicts, lists and tuples."""
    if isinstance(entry, Tensor):
        return [entry]
    parts = entry.values() if isinstance(entry, dict) else entry if isinstance(entry, list | tuple) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def assert_like(ours: Any, theirs: Any, path: str = "") -> None:
    """The same keys and types, and tensors of the same dtype and shape, all the way down."""
    assert type(ours) is type(theirs), path
    if isinstance(ours, Tensor):
        assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device), path
    elif isinstance(ours, dict):
        assert set(ours) == set(theirs), path
        for key in ours:
            assert_like(ours[key], theirs[key], f"{path}/{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), path
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_like(one, other, f"{path}/{index}")


def saved(path: Path, plugin: MasterWeightPrecision | None = None, module: Any = None, **options: Any) -> Path:
    """A checkpoint of a short run."""
    fit(module or Model(), classification(4), plugin, **options).save_checkpoint(path)
    return path


def load(path: Path) -> dict[str, Any]:
    contents: dict[str, Any] = torch.load(path, weights_only=True)
    return contents


@pytest.mark.parametrize("optimizer_state", MOMENT_STORAGES)
@pytest.mark.parametrize("master_weights", MASTER_STORAGES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_file_has_12_bytes_a_parameter_in_fp32(
    tmp_path: Path, precision: Any, master_weights: str, optimizer_state: str
) -> None:
    """Saved in the middle of training: master and two moments. And each only once: the file itself is no larger."""

    plugin = MasterWeightPrecision(precision, master_weights=master_weights, optimizer_state=optimizer_state)
    assert_bytes_a_parameter(12, tmp_path / "file.ckpt", plugin)


def test_and_8_with_momentum_alone(tmp_path: Path) -> None:
    configure = lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)  # noqa: E731
    assert_bytes_a_parameter(8, tmp_path / "file.ckpt", MasterWeightPrecision("16-true"), configure)


def assert_bytes_a_parameter(count: int, path: Path, plugin: MasterWeightPrecision, configure: Any = None) -> None:
    class Wide(Classifier):
        def on_train_epoch_end(self) -> None:
            self.trainer.save_checkpoint(path)

    module = Wide(nn.Sequential(nn.Linear(16, 1024), nn.ReLU(), nn.Linear(1024, 4)), configure)
    fit(module, classification(2, size=4), plugin)
    large = [tensor for tensor in tensors(load(path)) if tensor.dim()]
    assert {tensor.dtype for tensor in large} == {torch.float32}
    parameters = sum(parameter.numel() for parameter in module.parameters())
    assert sum(tensor.numel() * 4 for tensor in large) == count * parameters
    assert path.stat().st_size < count * parameters + 20_000  # names, counters, and what a zip adds


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("optimizer_state", MOMENT_STORAGES)
def test_the_whole_file_is_like_one_of_32_true_but_for_the_plugins_entry(
    tmp_path: Path, optimizer_state: str, amsgrad: bool
) -> None:
    def module() -> Classifier:
        return Classifier(net(), adamw(amsgrad=amsgrad))

    plugin = MasterWeightPrecision("16-true", optimizer_state=optimizer_state)
    ours = load(saved(tmp_path / "ours.ckpt", plugin, module()))
    theirs = load(saved(tmp_path / "theirs.ckpt", None, module()))
    entry = ours.pop("MasterWeightPrecision")
    assert entry == {
        "loss_scale": {"scale": 2.0**15, "growth_tracker": 4, "overflows_left": 1},
        "skipped_steps": 0,
        "held_schedules": [],
    }
    assert_like(ours, theirs)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_module_and_an_optimizer_that_know_nothing_of_us_load_it(tmp_path: Path, precision: Any) -> None:
    module = Model()
    path = saved(tmp_path / "file.ckpt", MasterWeightPrecision(precision), module)
    entries = load(path)
    lightning = Model.load_from_checkpoint(path)
    plain = Model()
    plain.load_state_dict(entries["state_dict"])
    optimizer = torch.optim.AdamW(plain.parameters())
    optimizer.load_state_dict(entries["optimizer_states"][0])
    for loaded in (lightning, plain):
        torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)
    plain(torch.randn(2, 16)).sum().backward()
    optimizer.step()
    assert {state["step"].item() for state in optimizer.state.values()} == {5.0}


def mixed(**options: Any) -> dict[str, Any]:
    """`16-mixed`, which the Trainer gives to GPUs only, though its parts run here too."""
    return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", **options))]}


FOREIGN: dict[str, Any] = {
    "32-true": dict,
    "16-mixed": mixed,
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "bf16-true": lambda: {"precision": "bf16-true"},
}
TRAINING = 1e-2
"""Of the loss: how far half precision may lead away from FP32 in a dozen steps. Worst seen 0.0084, under `bf16-true`
without masters; else 0.0014."""


@pytest.mark.parametrize("other", FOREIGN)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("ours_first", [True, False], ids=["from-ours", "to-ours"])
def test_a_run_goes_on_under_another_precision(tmp_path: Path, precision: Any, other: str, ours_first: bool) -> None:
    batches = classification(6)

    def go_on(first: dict[str, Any], second: dict[str, Any]) -> Classifier:
        saved_by = fit(Classifier(net()), batches, **first)
        saved_by.save_checkpoint(tmp_path / "file.ckpt")
        module = Classifier(net())
        goes_on = trainer(max_epochs=2, **second)
        goes_on.fit(module, loader(batches), ckpt_path=tmp_path / "file.ckpt", weights_only=True)
        assert goes_on.global_step == 12
        return module

    ours: dict[str, Any] = {"plugins": [MasterWeightPrecision(precision)]}
    module = go_on(ours, FOREIGN[other]()) if ours_first else go_on(FOREIGN[other](), ours)
    fp32 = Classifier(net())
    fit(fp32, batches, max_epochs=2)
    assert module.losses == pytest.approx(fp32.losses[6:], abs=TRAINING)


def test_the_loss_scale_of_16_mixed_is_taken_over(tmp_path: Path) -> None:
    path = saved(tmp_path / "mixed.ckpt", **mixed(init_scale=2.0**9, growth_interval=100))
    plugin = MasterWeightPrecision("16-true")
    ours = trainer(plugin, max_epochs=2)
    ours.fit(Model(), loader(classification(4)), ckpt_path=path, weights_only=True)
    assert plugin.state_dict()["loss_scale"] == {"scale": 2.0**9, "growth_tracker": 8, "overflows_left": 1}


def test_a_file_resumes_in_any_storage(tmp_path: Path) -> None:
    """And in those that lose nothing alike, whatever wrote it: the FP32 values in the file are all there is."""
    path = saved(tmp_path / "file.ckpt", MasterWeightPrecision("bf16-true", **PRESETS["compact"]))

    def losses(plugin: MasterWeightPrecision | None) -> list[float]:
        module = Model()
        goes_on = trainer(plugin, max_epochs=2)
        goes_on.fit(module, loader(classification(4)), ckpt_path=path, weights_only=True)
        return module.losses

    fp32 = losses(None)
    for storage in (("split8", "8bit"), ("float32", "bfloat16"), ("split", "float32"), ("float32", "float32")):
        ours = losses(MasterWeightPrecision("bf16-true", master_weights=storage[0], optimizer_state=storage[1]))
        assert ours == pytest.approx(fp32, abs=TRAINING), storage
        if storage == ("split", "float32"):
            exact = ours
    assert ours == exact


def test_weights_alone_are_fp32_and_nothing_else_is_there(tmp_path: Path) -> None:
    keeps = ModelCheckpoint(tmp_path, filename="weights", save_weights_only=True)
    module = Model()
    fit(module, classification(4), MasterWeightPrecision("16-true"), callbacks=[keeps], enable_checkpointing=True)
    entries = load(tmp_path / "weights.ckpt")
    assert not {"optimizer_states", "MasterWeightPrecision", "lr_schedulers"} & set(entries)
    torch.testing.assert_close(entries["state_dict"], module.state_dict(), rtol=0, atol=0)
    loaded = Model.load_from_checkpoint(tmp_path / "weights.ckpt")
    torch.testing.assert_close(loaded.state_dict(), module.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_file_of_after_fit_is_the_file_of_its_end(tmp_path: Path, precision: Any) -> None:
    class Saves(Model):
        def on_train_end(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "inside.ckpt")

    plugin = MasterWeightPrecision(precision, master_weights="split8", optimizer_state="8bit")
    saved(tmp_path / "after.ckpt", plugin, Saves())
    inside, after = load(tmp_path / "inside.ckpt"), load(tmp_path / "after.ckpt")
    assert_like(after, inside)
    for key in ("state_dict", "optimizer_states", "MasterWeightPrecision", "lr_schedulers"):
        torch.testing.assert_close(after[key], inside[key], rtol=0, atol=0)


def test_weights_that_are_missing_stay_where_loading_is_not_strict(tmp_path: Path) -> None:
    """Before training and in the middle of it, where weights are half."""

    class Partial(Model):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                before = self.state_dict()
                self.load_state_dict(part, strict=False)
                after = self.state_dict()
                for name in after:
                    torch.testing.assert_close(after[name], part.get(name, before[name]), rtol=0, atol=0)
                looked.append(before)

    looked: list[Any] = []
    path = saved(tmp_path / "file.ckpt")
    entries = load(path)
    del entries["state_dict"]["net.0.weight"]
    part = entries["state_dict"]
    torch.save(entries, path)
    module = Partial()
    module.strict_loading = False
    start = module.net[0].weight.detach().clone()
    ours = trainer(MasterWeightPrecision("16-true"), max_epochs=2)
    ours.fit(module, loader(classification(4)), ckpt_path=path, weights_only=True)
    (before,) = looked
    assert torch.allclose(before["net.0.weight"], start, atol=0.05)  # two steps of 0.01 from where it was
    assert not torch.equal(before["net.0.weight"], start)


def test_the_hooks_of_saving_and_loading_see_fp32(tmp_path: Path) -> None:
    class Hooks(Model):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(checkpoint)
            checkpoint["average"] = {name: value.clone() for name, value in self.state_dict().items()}

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            seen.append(checkpoint)

        def on_train_end(self) -> None:
            self.trainer.save_checkpoint(path)

    class Watches(L.Callback):
        def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            seen.append(checkpoint)

        def on_load_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
            seen.append(checkpoint)

    seen: list[dict[str, Any]] = []
    path = tmp_path / "file.ckpt"
    plugin = MasterWeightPrecision("16-true", optimizer_state="8bit")
    fit(Hooks(), classification(4), plugin, callbacks=[Watches()])
    goes_on = trainer(plugin, max_epochs=2, callbacks=[Watches()])
    goes_on.fit(Hooks(), loader(classification(4)), ckpt_path=path, weights_only=True)
    assert len(seen) == 6  # saved, loaded, saved: by module and callback
    for checkpoint in seen:
        large = [tensor for tensor in tensors(checkpoint) if tensor.is_floating_point()]
        assert {tensor.dtype for tensor in large} == {torch.float32}
        assert len(large) > 8 + 2 * 8


def test_a_lower_scale_than_is_allowed_now_is_raised_to_that(tmp_path: Path) -> None:
    path = saved(tmp_path / "file.ckpt", MasterWeightPrecision("16-true", loss_scale=DynamicLossScale(8.0)))
    plugin = MasterWeightPrecision("16-true", loss_scale=DynamicLossScale(min_scale=64.0))
    ours = trainer(plugin, max_epochs=2)
    ours.fit(Model(), loader(classification(4)), ckpt_path=path, weights_only=True)
    assert plugin.loss_scale == 64.0


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_a_file_of_some_parameters_alone_is_fp32_and_resumes_bit_for_bit(precision: Any, tmp_path: Path) -> None:
    class Adapters(Classifier):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            held = {name: p.detach().clone() for name, p in self.named_parameters() if p.requires_grad}
            checkpoint["state_dict"] = {**held, "of_ones_own": torch.ones(2, dtype=torch.float16)}

    class Saves(L.Callback):
        def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "some.ckpt")

    def run(**options: Any) -> Any:
        net = mlp()
        net[0].requires_grad_(False)
        module = Adapters(net)
        module.strict_loading = False
        ours = trainer(MasterWeightPrecision(precision), max_epochs=2, callbacks=[Saves()])
        ours.fit(module, loader(classification(4)), **options)
        assert "save_checkpoint" not in vars(ours.strategy)
        return module.state_dict()

    whole = run()
    saved = torch.load(tmp_path / "some.ckpt", weights_only=True)["state_dict"]
    assert saved.pop("of_ones_own").dtype == torch.float16
    assert {value.dtype for value in saved.values()} == {torch.float32}
    torch.testing.assert_close(run(ckpt_path=tmp_path / "some.ckpt"), whole, rtol=0, atol=0)
