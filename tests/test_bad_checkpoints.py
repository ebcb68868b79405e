"""A file that cannot be resumed from says why, and leaves an FP32 model and nothing switched on."""

import contextlib
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from torch import nn
from training import Classifier, Configure, adamw, classification, fit, loader, mlp, trainer

from lightning_mpt import MasterWeightPrecision


def sgd(**options: Any) -> Configure:
    return lambda module: torch.optim.SGD(module.parameters(), lr=0.1, **options)


def saved(path: Path, module: Classifier, plugin: MasterWeightPrecision | None = None) -> None:
    fit(module, classification(2), plugin or MasterWeightPrecision("16-true")).save_checkpoint(path)


def refused(path: Path, error: Any, message: str | None, module: Classifier, *, named: bool = False) -> dict[str, Any]:
    """Resume from the file, which must fail as is said, and leave all well; the module's weights then.

    `named`: it is the plugin that finds the fault, and so the error names the file.
    """
    default, modes = torch.get_default_dtype(), torch._C._len_torch_function_stack()
    plugin = MasterWeightPrecision("16-true")
    with pytest.raises(error, match=message) as failed:
        trainer(plugin, max_epochs=2).fit(module, loader(classification(2)), ckpt_path=path, weights_only=True)
    if named and sys.version_info >= (3, 11):
        assert any(path.name in note for note in failed.value.__notes__)
    assert (torch.get_default_dtype(), torch._C._len_torch_function_stack()) == (default, modes)
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert not any(part._state_dict_hooks or part._load_state_dict_pre_hooks for part in module.modules())
    weights = copy.deepcopy(module.state_dict())
    if all(weight.isfinite().all() for weight in weights.values()):
        fit(module, classification(2), MasterWeightPrecision("bf16-true"))  # the module can be trained
    fit(Classifier(mlp()), classification(2), plugin)  # the plugin is free again
    return weights


def assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "damage",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_text("accuracy: 0.9\n" * 100),
        lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
        lambda path: torch.save(mlp().state_dict(), path),
    ],
    ids=["missing", "empty", "text", "cut", "weights"],
)
def test_a_file_that_is_no_checkpoint(tmp_path: Path, damage: Callable[[Path], Any]) -> None:
    """Lightning opens it, before it asks us for anything; what it says is its own."""
    path = tmp_path / "file.ckpt"
    saved(path, Classifier(mlp()))
    damage(path)
    module = Classifier(mlp())
    start = copy.deepcopy(module.state_dict())
    assert_same(refused(path, (OSError, EOFError, LookupError, RuntimeError, UnpicklingError), None, module), start)


def other_shape(entries: dict[str, Any]) -> None:
    entries["state_dict"]["net.0.weight"] = torch.zeros(3, 3)


def huge(entries: dict[str, Any]) -> None:
    entries["state_dict"]["net.2.weight"][3, 3] = 7e4


def nan(entries: dict[str, Any]) -> None:
    entries["state_dict"]["net.2.bias"][3] = float("nan")


def other_moment(entries: dict[str, Any]) -> None:
    entries["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(3)


def nan_moment(entries: dict[str, Any]) -> None:
    entries["optimizer_states"][0]["state"][0]["exp_avg"][3, 3] = float("nan")


def no_entry(entries: dict[str, Any]) -> None:
    entries["MasterWeightPrecision"] = None


def text_for_steps(entries: dict[str, Any]) -> None:
    entries["MasterWeightPrecision"]["skipped_steps"] = "many"


def no_scale(entries: dict[str, Any]) -> None:
    del entries["MasterWeightPrecision"]["loss_scale"]


def text_for_scale(entries: dict[str, Any]) -> None:
    entries["MasterWeightPrecision"]["loss_scale"]["scale"] = "high"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda entries: entries["state_dict"].pop("net.0.weight"), RuntimeError, r"Missing key.*net\.0\.weight"),
        (other_shape, RuntimeError, r"size mismatch for net\.0\.weight.*\[3, 3\]"),
        (nan, ValueError, r"net\.2\.bias holds inf or NaN"),
        (huge, ValueError, r"net\.2\.weight holds a weight of magnitude 70000, beyond the 65504.*use 'bf16-true'"),
        (lambda entries: entries.pop("optimizer_states"), KeyError, "contains only the model"),
        (other_moment, ValueError, r"exp_avg of parameter 0 has shape \(3,\) and the parameter \(64, 16\)"),
        (nan_moment, ValueError, "exp_avg of parameter 0 holds NaN.*load an earlier checkpoint"),
        (no_entry, ValueError, "'MasterWeightPrecision' is None, and should be a dictionary"),
        (text_for_steps, ValueError, "skipped_steps='many', and should have a number of steps"),
        (no_scale, ValueError, r"'MasterWeightPrecision' has .*'skipped_steps'\] and lacks \['loss_scale'\]"),
        (text_for_scale, ValueError, "scale='high' must be a positive finite number"),
    ],
    ids=[
        "key",
        "shape",
        "nan",
        "range",
        "weights only",
        "moment",
        "NaN moment",
        "no entry",
        "steps",
        "no scale",
        "scale",
    ],
)
def test_a_damaged_one(tmp_path: Path, damage: Callable[[dict[str, Any]], Any], error: Any, message: str) -> None:
    """What was loaded before the fault was found stays, as with 32-true."""
    path = tmp_path / "file.ckpt"
    saved(path, Classifier(mlp()))
    entries = torch.load(path, weights_only=True)
    damage(entries)
    torch.save(entries, path)
    module, fp32 = Classifier(mlp()), Classifier(mlp())
    with contextlib.suppress(RuntimeError):
        fp32.load_state_dict(entries["state_dict"])
    weights = refused(path, error, message, module, named=error is ValueError)
    assert_same(weights, fp32.state_dict())


@pytest.mark.parametrize(
    ("writes", "reads", "message"),
    [
        (sgd(momentum=0.9), adamw(), r"saved group 0 has .*'momentum'.* lacks \['betas', 'eps'\]"),
        (sgd(), adamw(), r"saved group 0 has .* lacks \['betas', 'eps'\]: load a state_dict of AdamW"),
        (adamw(), sgd(momentum=0.9), r"group 0 has .*'betas'.* lacks \['dampening', 'momentum'\] of SGD"),
        (adamw(), lambda module: torch.optim.Adagrad(module.parameters()), r"lacks .*'lr_decay'.* of Adagrad"),
        (
            adamw(),
            lambda module: torch.optim.AdamW([{"params": [p]} for p in module.parameters()]),
            "different number of parameter groups",
        ),
        (
            adamw(),
            lambda module: torch.optim.AdamW(module.net[0].parameters()),
            "doesn't match the size of optimizer's group",
        ),
    ],
    ids=["sgd for adamw", "plain sgd for adamw", "adamw for sgd", "adamw for adagrad", "groups", "parameters"],
)
def test_the_state_of_another_optimizer(tmp_path: Path, writes: Configure, reads: Configure, message: str) -> None:
    path = tmp_path / "file.ckpt"
    saved(path, Classifier(mlp(), writes))
    weights = torch.load(path, weights_only=True)["state_dict"]
    assert_same(refused(path, ValueError, message, Classifier(mlp(), reads), named=True), weights)


def test_another_model(tmp_path: Path) -> None:
    path = tmp_path / "file.ckpt"
    saved(path, Classifier(nn.Sequential(nn.Linear(16, 4))))
    refused(path, RuntimeError, r"Missing key\(s\).*net\.2\.weight", Classifier(mlp()))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors take notes from Python 3.11 on")
@pytest.mark.parametrize("hook", ["validation_step", "training_step"])
def test_an_error_of_the_users_own_after_the_file_is_loaded_does_not_name_it(tmp_path: Path, hook: str) -> None:
    path = tmp_path / "file.ckpt"
    saved(path, Classifier(mlp()))
    module = Classifier(mlp())

    def fails(*_: Any) -> None:
        raise ArithmeticError("the user's own")

    setattr(module, hook, fails)
    val = loader(classification(2)) if hook == "validation_step" else None
    ours = trainer(MasterWeightPrecision("16-true"), max_epochs=2, num_sanity_val_steps=1, limit_val_batches=1)
    with pytest.raises(ArithmeticError) as failed:
        ours.fit(module, loader(classification(2)), val, ckpt_path=path, weights_only=True)
    assert not any(path.name in note for note in getattr(failed.value, "__notes__", ()))
