"""A LightningCLI configuration as a target: its `model` and `data` sections, and what of `trainer` changes a step.

The rest of the `trainer` section is left out: the precision, the profiler and the number of steps are the command's to
choose, and callbacks, loggers and strategies are no part of what is compared. Needs jsonargparse, which the extra
`cli` brings; only `make` imports it.
"""

import importlib.util
import re
import tempfile
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

TRAINER_SETTINGS = (
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "deterministic",
    "benchmark",
)
"""Of the `trainer` section: what changes what a step computes."""


def read(path: str) -> dict[str, Any]:
    """The sections of a configuration.

    Raises:
        ValueError: jsonargparse is not installed; `path` is no YAML, or has no section `model`.
        OSError: `path` cannot be read.
    """
    import yaml  # Lightning brings it

    if importlib.util.find_spec("jsonargparse") is None:
        raise ValueError(
            "--config needs jsonargparse, which is not installed: pip install 'lightning-mpt[cli]'. Or name the "
            "classes by --model and --data."
        )
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if isinstance(content, dict) and "model" not in content and isinstance(content.get("fit"), dict):
        content = content["fit"]
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no sections: expected a LightningCLI configuration, with `model` at the least.")
    return content


def class_path(section: Any) -> str | None:
    """The class that a section names; None where it has only arguments."""
    if isinstance(section, str):
        return section
    return section.get("class_path") if isinstance(section, dict) else None


def trainer_settings(path: str) -> dict[str, Any]:
    """What the Trainer of `path` is given that changes a step."""
    trainer = read(path).get("trainer") or {}
    return {name: trainer[name] for name in TRAINER_SETTINGS if trainer.get(name) is not None}


def make(path: str, role: str, constructor: Callable[..., Any] | None, arguments: Mapping[str, str]) -> Any:
    """The model or the data as LightningCLI makes it; None for data that `path` does not speak of.

    Args:
        path: the configuration.
        role: `model` or `data`. The other is not looked at.
        constructor: the class whose arguments the section has; None where the section names one.
        arguments: those that go before the configuration's, as `LightningCLI` reads them from a command line.

    Raises:
        ValueError: the configuration does not fit the class, or the constructor raised.
    """
    import lightning.pytorch as pl
    import yaml
    from lightning.pytorch.cli import LightningCLI

    class Part(LightningCLI):
        """Makes one thing, and nothing that trains."""

        def instantiate_trainer(self, **_: Any) -> None:  # type: ignore[override]
            return None

    of_model = role == "model"
    sections = ("model", "optimizer", "lr_scheduler") if of_model else ("data",)
    content = {name: section for name, section in read(path).items() if name in sections}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        kept = Path(folder) / "config.yaml"
        kept.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        # It warns of this process's own command line, and jsonargparse of how Lightning calls it.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            part = Part(
                constructor if of_model else pl.LightningModule,
                None if of_model else constructor,
                save_config_callback=None,
                seed_everything_default=False,
                parser_kwargs={"exit_on_error": False},
                run=False,
                args=["--config", str(kept), *(f"--{role}.{name}={value}" for name, value in arguments.items())],
                auto_configure_optimizers=of_model,
            )
        except Exception as error:
            raise ValueError(f"{path}: {_said(error)}") from error
    return part.model if of_model else part.datamodule


def _said(error: Exception) -> str:
    """In one line what jsonargparse says in many: what is wrong, without all the types that the value is not of."""
    text = " ".join(str(error).split())
    inside = re.search(r"Errors: - (.*?) - Expected a <class 'NoneType'>", text)
    root: BaseException = error
    while root.__cause__ or root.__context__:
        root = root.__cause__ or root.__context__  # type: ignore[assignment]
    own = isinstance(root, ArgumentError | ValueError | TypeError)
    return ("" if own else f"{type(root).__name__}: ") + (inside.group(1) if inside else text)
