"""The plugin by class path in a LightningCLI configuration: kinds of loss scale, and what is said of wrong values."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.cli import LightningCLI
from training import Classifier, classification, fit, loader, mlp

from lightning_mpt import ConstantLossScale, DynamicLossScale, MasterWeightPrecision

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's, of how Lightning calls it

EXAMPLE = Path(__file__).parents[1] / "examples" / "train_gpt.yaml"
SMALL = {"seq_len": 32, "steps": 6}

CONFIG = """
seed_everything: 0
model:
  net:
    class_path: torch.nn.Linear
    init_args: {{in_features: 16, out_features: 4}}
trainer:
  accelerator: cpu
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  plugins:
    - class_path: lightning_mpt.MasterWeightPrecision
      init_args: {init_args}
"""


def trained(init_args: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> Any:
    """The CLI, after a few steps of a configuration with these arguments of the plugin."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.format(init_args=init_args))
    monkeypatch.setattr(sys, "argv", ["train"])
    cli = LightningCLI(Classifier, run=False, save_config_callback=None, args=[f"--config={config}", *options])
    cli.trainer.fit(cli.model, loader(classification(4)))
    return cli


@pytest.mark.parametrize(
    ("loss_scale", "kind", "scale"),
    [
        ("auto", DynamicLossScale, 2.0**15),
        ("256", ConstantLossScale, 256.0),
        ("2.0e+2", ConstantLossScale, 200.0),
        ("null", ConstantLossScale, 1.0),
        ("{class_path: lightning_mpt.ConstantLossScale, init_args: {scale: 64}}", ConstantLossScale, 64.0),
        (
            "{class_path: lightning_mpt.DynamicLossScale, init_args: {init_scale: 512, growth_interval: 2}}",
            DynamicLossScale,
            2048.0,
        ),
    ],
)
def test_a_loss_scale_from_yaml_trains(
    loss_scale: str, kind: type, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = trained(f"{{precision: 16-true, loss_scale: {loss_scale}}}", tmp_path, monkeypatch)
    plugin = cli.trainer.precision_plugin
    assert isinstance(plugin, MasterWeightPrecision)
    assert isinstance(plugin._loss_scale, kind)
    assert plugin.loss_scale == scale  # after four clean steps
    assert cli.trainer.global_step == 4
    assert {parameter.dtype for parameter in cli.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(("text", "scale"), [("1024", 1024.0), ("dynamic", 2.0**15)])
def test_a_loss_scale_from_the_command_line_is_a_number_where_it_is_one(
    text: str, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--trainer.plugins=lightning_mpt.MasterWeightPrecision", f"--trainer.plugins.loss_scale={text}")
    assert trained("{}", tmp_path, monkeypatch, *options).trainer.precision_plugin.loss_scale == scale


def test_the_example_trains_with_its_plugin_its_scale_and_its_profiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # where the report goes
    monkeypatch.setattr(sys, "argv", ["train"])
    small = [f"--{part}.init_args.{name}={value}" for part in ("model", "data") for name, value in SMALL.items()]
    options = ["--model.init_args.size=nano", "--data.init_args.batch_size=2", "--trainer.accelerator=cpu"]
    cli = LightningCLI(args=["fit", f"--config={EXAMPLE}", *small, *options], save_config_callback=None)
    plugin, report = cli.trainer.precision_plugin, cli.trainer.profiler.report
    assert isinstance(plugin, MasterWeightPrecision)
    assert isinstance(plugin._loss_scale, DynamicLossScale)
    assert cli.trainer.global_step == SMALL["steps"]
    assert sum(report.categories.values()) == report.peak_bytes
    assert report.categories["master_weights"] == report.categories["weights"]
    assert "master_weights" in capsys.readouterr().out


def test_module_types_and_storages_from_yaml_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (
        "{precision: bf16-true, fp32_modules: [torch.nn.LayerNorm], master_weights: split8, optimizer_state: 8bit}"
    )
    plugin = trained(arguments, tmp_path, monkeypatch).trainer.precision_plugin
    assert (plugin._fp32_modules, plugin._master_weights) == ((torch.nn.LayerNorm,), "split8")


@pytest.mark.parametrize(
    ("init_args", "said"),
    [
        ("{precision: 16-mixed}", "16-mixed"),
        ("{loss_scale: big}", "loss_scale='big' is not a loss scale: use 'auto', 'dynamic', None"),
        ("{loss_scale: -2}", "loss_scale=-2.0 is not a loss scale"),
        ("{master_weights: fp32}", "master_weights='fp32' is not a way to store master weights: use one of"),
        ("{weights: split}", "weights"),
        (
            "{loss_scale: {class_path: lightning_mpt.DynamicLossScale, init_args: {growth_factor: 1}}}",
            "growth_factor=1.0 must be a finite number above 1",
        ),
    ],
)
def test_a_wrong_value_is_named(
    init_args: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        trained(init_args, tmp_path, monkeypatch)
    assert said in capsys.readouterr().err + str(error.value)


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. will be overridden:UserWarning")
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_an_optimizer_keeps_its_short_name_after_a_run(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plugin puts a class of the same name in front of the optimizer's, which the command line must not find."""
    kind = getattr(torch.optim, optimizer)
    fit(Classifier(mlp(), lambda module: kind(module.parameters(), lr=0.1)), classification(2), MasterWeightPrecision())
    cli = trained("{precision: 16-true}", tmp_path, monkeypatch, f"--optimizer={optimizer}", "--optimizer.lr=0.1")
    assert isinstance(cli.trainer.optimizers[0], kind)
    assert cli.trainer.global_step == 4
