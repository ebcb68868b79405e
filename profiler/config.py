"""A LightningCLI configuration as a target: its `model` and `data` sections, and what of `trainer` changes a step.

The rest of the `trainer` section is left out: the precision, the profiler and the number of steps are the command's to
choose, and callbacks, loggers and strategies are no part of what is compared. Needs jsonargparse, which the extra
`cli` brings; only `build` imports it.
"""

import importlib.util
import tempfile
import warnings
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

_SECTIONS = ("model", "data", "optimizer", "lr_scheduler")


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


def build(
    path: str,
    model: Callable[..., Any] | None,
    model_arguments: Mapping[str, str],
    data: Callable[..., Any] | None,
    data_arguments: Mapping[str, str],
) -> tuple[Any, Any]:
    """The model and the data as LightningCLI makes them (None for data that `path` does not speak of).

    Args:
        path: the configuration.
        model: the class whose arguments the section `model` has; None where the section names one.
        model_arguments: over those of the configuration, as `LightningCLI` reads them from a command line.
        data: the same for the section `data`.
        data_arguments: and its arguments.

    Raises:
        ValueError: the configuration does not fit the classes.
        Exception: whatever the constructors raise.
    """
    import yaml
    from jsonargparse import ArgumentError
    from lightning.pytorch.cli import LightningCLI

    class Parts(LightningCLI):
        """Makes the model and the data and nothing that trains."""

        def instantiate_trainer(self, **_: Any) -> None:  # type: ignore[override]
            return None

    content = {name: section for name, section in read(path).items() if name in _SECTIONS}
    arguments = [
        f"--{role}.{name}={value}"
        for role, given in (("model", model_arguments), ("data", data_arguments))
        for name, value in given.items()
    ]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        kept = Path(folder) / "config.yaml"
        kept.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        # It warns of this process's own command line.
        warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
        try:
            parts = Parts(
                model,
                data,
                save_config_callback=None,
                seed_everything_default=False,
                parser_kwargs={"exit_on_error": False},
                run=False,
                args=["--config", str(kept), *arguments],
            )
        except ArgumentError as error:
            said = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ValueError(f"{path}: {' '.join(said)}") from error
    return parts.model, parts.datamodule
