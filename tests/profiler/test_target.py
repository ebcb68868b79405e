"""What is to be trained, by class path and arguments as text."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from lightning_mpt.profiler.codec import decode, encode
from lightning_mpt.profiler.compare.class_path import load
from lightning_mpt.profiler.compare.target import Target, TargetError

HERE = str(Path(__file__).parent / "trained.py")
CONFIG = str(Path(__file__).parents[2] / "examples" / "train_gpt.yaml")


@pytest.fixture(autouse=True)
def _import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is put on the import path is taken off again. The top of the repository is the current directory."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(Path(__file__).parents[2])


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The current directory holds `somepackage.inner` with a class in a class, and modules that do not import."""
    folder = tmp_path / "somepackage"
    folder.mkdir()
    (folder / "inner.py").write_text("class Outer:\n    class Nested:\n        pass\n")
    (folder / "broken.py").write_text("import a_module_that_is_not_there\n")
    (folder / "wrong.py").write_text("def f(:\n")
    monkeypatch.chdir(tmp_path)
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "somepackage"]:
        del sys.modules[name]


def refused(target: Target) -> str:
    with pytest.raises(TargetError) as info:
        target.build()
    return str(info.value)


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("path", ["somepackage.inner:Outer.Nested", "somepackage.inner.Outer.Nested"])
def test_the_current_directory_is_importable(path: str) -> None:
    assert load(path).__qualname__ == "Outer.Nested"


def test_a_file_is_loaded_once() -> None:
    assert load(f"{HERE}:Tiny") is load(f"{HERE}:Tiny")
    assert load("examples/train_gpt.py:GPT").__name__ == "GPT"


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("somepackag.inner:Outer", "Did you mean somepackage?"),
        ("somepackage.iner:Outer", "no module somepackage.iner in somepackage. Did you mean inner?"),
        ("somepackage.inner:Outter", "has no Outter. Did you mean Outer?"),
        ("somepackage.inner:Outer.Nestled", "Outer has no Nestled"),
        ("somepackage.inner.Outter", "Did you mean Outer?"),
        ("somepackage/iner.py:Outer", "Did you mean inner.py?"),
        ("somepackage.broken:Any", "importing somepackage.broken failed with ModuleNotFoundError"),
        ("somepackage/wrong.py:Any", "failed with SyntaxError"),
        ("Outer", "no class path"),
        (f"{HERE}:constant", "neither a class nor a function"),
    ],
)
def test_a_path_to_nothing_is_refused_with_what_is_like_it(path: str, said: str) -> None:
    assert said in refused(Target(path))


def test_a_target_is_built_with_its_arguments() -> None:
    model, data = Target(f"{HERE}:Tiny", {"width": "4", "bias": "false"}, f"{HERE}:Data", {"batch_size": "2"}).build()
    assert [tuple(p.shape) for p in model.parameters()] == [(4, 8), (1, 4), (1,)]
    assert data.batch_size == 2


def test_a_function_that_makes_the_model_will_do() -> None:
    model, data = Target(f"{HERE}:make_tiny", {"width": "3"}, f"{HERE}:Samples").build()
    assert model.net[0].out_features == 3
    assert isinstance(data, DataLoader)


def test_lightning_s_own_demos_are_models_too() -> None:
    model, data = Target(
        "lightning.pytorch.demos:LightningTransformer", {"vocab_size": "11"}, f"{HERE}:Samples"
    ).build()
    assert model.model.vocab_size == 11
    assert data is not None
    assert Target("lightning.pytorch.demos.boring_classes:BoringModel").build()[1] is None


def test_a_model_with_its_own_data_needs_no_other() -> None:
    assert Target(f"{HERE}:WithData").build()[1] is None


@pytest.mark.parametrize("name", ["Samples", "Stream"])
def test_a_dataset_is_wrapped_in_a_loader(name: str) -> None:
    _, data = Target(f"{HERE}:Tiny", {}, f"{HERE}:{name}", {"batch_size": "5", "drop_last": "true"}).build()
    assert isinstance(data, DataLoader)
    assert next(iter(data)).shape == (5, 8)
    assert data.drop_last


def test_an_iterable_of_batches_is_left_as_it_is() -> None:
    _, data = Target(f"{HERE}:Tiny", {}, f"{HERE}:Batches").build()
    assert type(data).__name__ == "Batches"


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (Target(f"{HERE}:Plain"), "is an nn.Module and no LightningModule"),
        (Target(f"{HERE}:Kind"), "is of type Kind and no LightningModule"),
        (Target(f"{HERE}:make_number"), "is of type int and no LightningModule"),
        (Target(f"{HERE}:NoStep"), "defines no training_step"),
        (Target(f"{HERE}:Tiny"), "no train_dataloader of its own: name its data by --data"),
        (Target(f"{HERE}:Tiny", {"wdith": "3"}), "--model.wdith is not an argument of Tiny. Did you mean width?"),
        (Target(f"{HERE}:Tiny", {"zzz": "3"}), "It takes width, lr, bias."),
        (Target(f"{HERE}:Tiny", {"width": "x"}), "--model.width 'x' is not an int."),
        (Target(f"{HERE}:Tiny", {"width": "-3"}), "Tiny(width=-3) raised RuntimeError"),
        (Target(f"{HERE}:make_tiny"), "make_tiny needs width: give --model.width VALUE."),
        (Target(f"{HERE}:WithData", {}, f"{HERE}:Kind.PLAIN"), "neither a class nor a function"),
        (Target(f"{HERE}:WithData", {}, f"{HERE}:Plain"), "neither a LightningDataModule nor a Dataset"),
        (Target(f"{HERE}:WithData", {}, None, {"count": "3"}), "--data.count is given without --data"),
        (Target(f"{HERE}:WithData", {}, f"{HERE}:Data", {"shuffle": "yes"}), "--data.shuffle is not an argument"),
        (Target(f"{HERE}:WithData", {}, f"{HERE}:Samples", {"batch_size": "x"}), "--data.batch_size 'x' is not an int"),
        (Target(f"{HERE}:WithData", {}, f"{HERE}:Stream", {"shuffle": "yes"}), "has an order of its own"),
        (Target(f"{HERE}:WithData", {}, f"{HERE}:Batches", {"batch_size": "2"}), "is not an argument of Batches"),
        (Target(), "neither a model nor a configuration"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_be_built_says_why(target: Target, said: str) -> None:
    assert said in refused(target)


def test_a_check_makes_nothing() -> None:
    Target(f"{HERE}:Tiny", {"width": "-3"}, f"{HERE}:Samples").check()  # a constructor would raise
    with pytest.raises(TargetError, match="sise"):
        Target("examples.train_gpt:GPTModule", {"sise": "nano"}).check()


def test_a_target_goes_through_json() -> None:
    target = Target("a:B", {"c": "1"}, "d:E", {"f": "x"}, "g.yaml")
    assert decode(Target, json.loads(json.dumps(encode(target)))) == target
    assert str(target) == "a:B(c=1) on d:E(f=x)"


# -- configurations of LightningCLI -----------------------------------------------------------------------------------


def test_a_configuration_gives_model_data_and_clipping() -> None:
    target = Target(config=CONFIG, model_arguments={"size": "nano"}, data_arguments={"batch_size": "2"})
    target.check()
    model, data = target.build()
    assert (model.hparams["size"], model.hparams["steps"]) == ("nano", 200)
    assert data.hparams["batch_size"] == 2
    assert target.trainer_settings() == {"gradient_clip_val": 1.0}


def test_a_configuration_may_have_only_arguments(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("fit:\n  model:\n    width: 4\n  data:\n    batch_size: 3\n  trainer:\n    max_steps: 3\n")
    target = Target(f"{HERE}:Tiny", {}, f"{HERE}:Data", {}, str(config))
    model, data = target.build()
    assert model.net[0].out_features == 4
    assert data.batch_size == 3
    assert target.trainer_settings() == {}


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. will be overridden:UserWarning")  # as is meant here
def test_a_configuration_may_name_the_optimizer(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("model:\n  width: 4\noptimizer:\n  class_path: torch.optim.SGD\n  init_args:\n    lr: 0.5\n")
    model = Target(f"{HERE}:Tiny", {}, f"{HERE}:Data", {}, str(config)).build_model()
    assert model.configure_optimizers().param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize(
    ("content", "arguments", "said"),
    [
        (None, {}, "nope.yaml"),
        ("- a list\n", {}, "holds no sections"),
        ("a: [\n", {}, "is not YAML"),
        ("model:\n  width: 3\n", {}, "section `model` names no class_path"),
        ("model:\n  class_path: examples.train_gpt.GPTModul\n", {}, "Did you mean GPTModule?"),
        ("model:\n  class_path: examples.train_gpt.GPTModule\n", {"sise": "nano"}, "Did you mean size?"),
        ("model:\n  class_path: examples.train_gpt.GPTModule\n", {"steps": "x"}, "Got value: x"),
        ("model:\n  class_path: examples.train_gpt.GPTModule\n", {"size": "huge"}, "KeyError: 'huge'"),
        ("model:\n  class_path: examples.train_gpt.GPTModule\n", {}, "no train_dataloader of its own"),
    ],
)
def test_a_wrong_configuration_says_so(content: str | None, arguments: dict, said: str, tmp_path: Path) -> None:
    config = tmp_path / ("nope.yaml" if content is None else "config.yaml")
    if content is not None:
        config.write_text(content)
    assert said in refused(Target(config=str(config), model_arguments=arguments))


def test_without_jsonargparse_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'lightning-mpt[cli]'" in refused(Target(config=CONFIG))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse's, of how Lightning calls it
def test_lightningcli_trains_from_the_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from lightning.pytorch.cli import LightningCLI

    from lightning_mpt import MasterWeightPrecision

    options = {
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.default_root_dir": tmp_path,
        "trainer.limit_val_batches": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.profiler.warmup_steps": 1,
        "model.size": "nano",
        "model.seq_len": 16,
        "data.batch_size": 2,
        "data.seq_len": 16,
    }
    arguments = ["fit", "--config", CONFIG, *(f"--{name}={value}" for name, value in options.items())]
    monkeypatch.setattr(sys, "argv", ["train"])
    cli = LightningCLI(save_config_callback=None, args=arguments)
    assert isinstance(cli.trainer.precision_plugin, MasterWeightPrecision)
    assert cli.trainer.global_step == 2
    assert (tmp_path / "memory_report.json").exists()
    assert "master_weights" in capsys.readouterr().out
    assert {p.dtype for p in cli.model.parameters()} == {torch.float32}  # as if FP32 had been trained
