"""What is to be trained, in words: a LightningModule and its data by class path, with arguments as text.

    Target("examples.train_gpt:GPTModule", {"size": "tiny"}, "examples.train_gpt:ByteText").build()

A class path is `package.module:Class`, `package.module.Class` or `folder/file.py:Class`; a function that makes the
object will do. The current directory can be imported from, as with `python -m`; so can the folder of a file, as with
`python folder/file.py`. A target is plain text, so that it can be handed to another process as JSON.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from . import config
from .arguments import check_names, parameters_of, read_arguments, read_value
from .class_path import TargetError, load, one_line

LOADER_ARGUMENTS = {"batch_size": int, "shuffle": bool, "num_workers": int, "drop_last": bool, "pin_memory": bool}
"""Arguments of the DataLoader that a Dataset is wrapped in."""


@dataclass(frozen=True)
class Target:
    """A model and its data, not made yet.

    Attributes:
        model: class path of a LightningModule.
        model_arguments: its constructor's arguments, as text.
        data: class path of a LightningDataModule, a Dataset, a DataLoader or an iterable of batches; None where the
            model has its own `train_dataloader`.
        data_arguments: its constructor's; for a Dataset those of the DataLoader too (LOADER_ARGUMENTS).
        config: a LightningCLI configuration, which says the rest: the classes where `model` and `data` are None, and
            the arguments that are not given.
    """

    model: str | None = None
    model_arguments: Mapping[str, str] = field(default_factory=dict)
    data: str | None = None
    data_arguments: Mapping[str, str] = field(default_factory=dict)
    config: str | None = None

    def check(self) -> None:
        """TargetError if a class or an argument is not there. Nothing is made."""
        if self.config is not None:
            self._classes()
            return
        self._model()
        self._data()

    def build(self) -> tuple[Any, Any]:
        """Make the LightningModule, and its data (None where the model has its own).

        Raises:
            TargetError: a class or an argument that is not there, an object of the wrong kind, or a constructor that
                raised.
        """
        return self.build_model(), self.build_data()

    def build_model(self) -> Any:
        """Make the LightningModule alone. Raises TargetError as `build` does."""
        if self.config is None:
            model = _make(self._model_path, *self._model())
        else:
            model = self._from_config(self.config, "model")
        _check_model(model, self._model_path)
        if self.data is None and (self.config is None or not _or_target_error(config.read, self.config).get("data")):
            _check_own_data(model, self._model_path)
        return model

    def build_data(self) -> Any:
        """Make the data alone; None where the model has its own. Raises TargetError as `build` does."""
        loader: dict[str, Any] = {}
        if self.config is not None:
            data = self._from_config(self.config, "data")
        else:
            constructor, arguments, loader = self._data()
            data = None if self.data is None else _make(self.data, constructor, arguments)
        return None if data is None else _loadable(data, loader, self.data or str(self.config))

    def trainer_settings(self) -> dict[str, Any]:
        """What the Trainer is to be given besides: of a configuration what changes a step."""
        return {} if self.config is None else _or_target_error(config.trainer_settings, self.config)

    def __str__(self) -> str:
        parts = [_call(self._model_path, self.model_arguments)]
        if self.data is not None:
            parts.append(_call(self.data, self.data_arguments))
        return " on ".join(parts)

    @property
    def _model_path(self) -> str:
        path = self.model or self.config
        if path is None:
            raise TargetError("There is neither a model nor a configuration: name one by --model MODULE:CLASS.")
        return path

    def _model(self) -> tuple[Callable[..., Any], dict[str, Any]]:
        constructor = load(self._model_path)
        if inspect.isclass(constructor):
            _check_model_class(constructor, self._model_path)
        return constructor, _arguments(constructor, self.model_arguments, "--model")

    def _classes(self) -> dict[str, Callable[..., Any] | None]:
        """By role the class that is given beside a configuration. What it names itself is checked too."""
        sections = _or_target_error(config.read, str(self.config))
        classes: dict[str, Callable[..., Any] | None] = {}
        for role, own, given, check in (
            ("model", self.model, self.model_arguments, _check_model_class),
            ("data", self.data, self.data_arguments, _check_data_class),
        ):
            path = own or config.class_path(sections.get(role))
            classes[role] = None
            if path is not None:
                constructor = load(path)
                if inspect.isclass(constructor):
                    check(constructor, path)
                try:
                    # `optimizer.init_args.lr`: what is inside an argument is for jsonargparse to know.
                    check_names(constructor, [name.partition(".")[0] for name in given], f"--{role}")
                except ValueError as error:
                    raise TargetError(str(error)) from None
                classes[role] = constructor if own else None
            elif role == "model" or sections.get(role) or given:
                raise TargetError(
                    f"{self.config}: section `{role}` names no class_path: name the class by --{role} MODULE:CLASS."
                )
        return classes

    def _from_config(self, path: str, role: str) -> Any:
        constructor = self._classes()[role]
        given = self.model_arguments if role == "model" else self.data_arguments
        return _or_target_error(lambda path: config.make(path, role, constructor, given), path)

    def _data(self) -> tuple[Callable[..., Any], dict[str, Any], dict[str, Any]]:
        if self.data is None:
            if self.data_arguments:
                raise TargetError(f"--data.{next(iter(self.data_arguments))} is given without --data MODULE:CLASS.")
            return dict, {}, {}
        constructor = load(self.data)
        if inspect.isclass(constructor):
            _check_data_class(constructor, self.data)
        own, loader = dict(self.data_arguments), {}
        if not inspect.isclass(constructor) or issubclass(constructor, Dataset) or hasattr(constructor, "__getitem__"):
            taken, _ = parameters_of(constructor)
            for name in LOADER_ARGUMENTS.keys() & own.keys() - taken.keys():
                try:
                    loader[name] = read_value(own.pop(name), LOADER_ARGUMENTS[name])
                except ValueError as error:
                    raise TargetError(f"--data.{name} {self.data_arguments[name]!r} {error}.") from None
        return constructor, _arguments(constructor, own, "--data"), loader


def _arguments(constructor: Callable[..., Any], given: Mapping[str, str], option: str) -> dict[str, Any]:
    try:
        return read_arguments(constructor, given, option)
    except ValueError as error:
        raise TargetError(str(error)) from None


def _make(path: str, constructor: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return constructor(**arguments)
    except Exception as error:
        raise TargetError(
            f"{_call(path, {name: repr(value) for name, value in arguments.items()})} raised {one_line(error)}"
        ) from error


def _check_model_class(cls: type, path: str) -> None:
    import lightning.pytorch as pl

    if issubclass(cls, pl.LightningModule):
        return
    if any(base.__module__.startswith("pytorch_lightning.") for base in cls.__mro__):
        raise TargetError(
            f"{path!r} is a LightningModule of the package pytorch_lightning, which the Trainer of the package "
            "lightning does not take: import it from lightning.pytorch."
        )
    what = "an nn.Module" if issubclass(cls, nn.Module) else f"of type {cls.__qualname__}"
    raise TargetError(
        f"{path!r} is {what} and no LightningModule, so that there is no training_step and no optimizer to run: "
        "wrap it in a LightningModule."
    )


def _check_model(model: Any, path: str) -> None:
    _check_model_class(type(model), path)
    for name in ("training_step", "configure_optimizers"):
        if not _overrides(model, name):
            raise TargetError(f"{path!r} defines no {name}: without one there is nothing to train.")


def _check_own_data(model: Any, path: str) -> None:
    if not _overrides(model, "train_dataloader"):
        raise TargetError(
            f"{path!r} has no train_dataloader of its own: name its data by --data MODULE:CLASS "
            "(a LightningDataModule, or a Dataset)."
        )


def _overrides(model: Any, name: str) -> bool:
    import lightning.pytorch as pl

    own = getattr(model, name, None)
    return own is not None and getattr(own, "__func__", own) is not getattr(pl.LightningModule, name, None)


def _check_data_class(cls: type, path: str) -> None:
    import lightning.pytorch as pl

    kinds = (pl.LightningDataModule, Dataset, DataLoader)
    if issubclass(cls, kinds) or hasattr(cls, "__iter__") or hasattr(cls, "__getitem__"):
        return
    raise TargetError(
        f"{path!r} is neither a LightningDataModule nor a Dataset, a DataLoader or an iterable: nothing can be "
        "trained on it."
    )


def _loadable(data: Any, loader: dict[str, Any], path: str) -> Any:
    """The data as the Trainer takes it: a Dataset in a DataLoader, anything else as it is."""
    import lightning.pytorch as pl

    _check_data_class(type(data), path)
    whole = isinstance(data, pl.LightningDataModule | DataLoader)
    samples = isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
    if samples and not whole:
        if isinstance(data, IterableDataset) and loader.get("shuffle"):
            raise TargetError(f"--data.shuffle: {path!r} is an IterableDataset, which has an order of its own.")
        return DataLoader(data, **loader)
    if loader:
        raise TargetError(
            f"--data.{next(iter(loader))}: {path!r} gives batches as they are, and is no Dataset that a DataLoader "
            "would make batches of."
        )
    return data


def _call(path: str, arguments: Mapping[str, str]) -> str:
    inside = ", ".join(f"{name}={value}" for name, value in arguments.items())
    return f"{path}({inside})" if inside else path


def _or_target_error(function: Callable[[str], Any], path: str) -> Any:
    try:
        return function(path)
    except (ValueError, OSError) as error:
        raise TargetError(str(error)) from error
