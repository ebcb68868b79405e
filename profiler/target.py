"""What is to be trained, in words: a LightningModule and its data by class path, with arguments as text.

    Target("examples.train_gpt:GPTModule", {"size": "tiny"}, "examples.train_gpt:ByteText").build()

A class path is `package.module:Class`, `package.module.Class` or `folder/file.py:Class`; a function that makes the
object will do. The current directory can be imported from, as with `python -m`; so can the folder of a file, as with
`python folder/file.py`. A target is plain text, so that it can be handed to another process as JSON.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from . import config
from .arguments import nearest, parameters_of, read_arguments, read_value

LOADER_ARGUMENTS = {"batch_size": int, "shuffle": bool, "num_workers": int, "drop_last": bool, "pin_memory": bool}
"""Arguments of the DataLoader that a Dataset is wrapped in."""


class TargetError(ValueError):
    """What is to be trained cannot be had as it is written. One line says why and what would do."""


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
        if self.config is not None:
            model, data = self._from_config(self.config)
            loader: dict[str, Any] = {}
        else:
            model = _make(self._model_path, *self._model())
            constructor, arguments, loader = self._data()
            data = None if self.data is None else _make(self.data, constructor, arguments)
        _check_model(model, self._model_path)
        if data is None:
            _check_own_data(model, self._model_path)
            return model, None
        return model, _loadable(data, loader, self.data or str(self.config))

    def trainer_settings(self) -> dict[str, Any]:
        """What the Trainer is to be given besides: of a configuration what changes a step."""
        return {} if self.config is None else _or_target_error(config.trainer_settings, self.config)

    def to_json(self) -> dict[str, Any]:
        """As dictionaries and strings."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "Target":
        """What `to_json` gave."""
        return cls(**content)

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

    def _classes(self) -> tuple[Callable[..., Any] | None, Callable[..., Any] | None]:
        """The classes that are given beside a configuration. What it names is loaded too, for a better error."""
        sections = _or_target_error(config.read, str(self.config))
        for role, check in (("model", _check_model_class), ("data", _check_data_class)):
            named = getattr(self, role)
            path = named or config.class_path(sections.get(role))
            if path is not None:
                constructor = load(path)
                if inspect.isclass(constructor):
                    check(constructor, path)
            elif role == "model" or sections.get(role):
                raise TargetError(
                    f"{self.config}: section `{role}` names no class_path: name it by --{role} MODULE:CLASS."
                )
        return (load(self.model) if self.model else None, load(self.data) if self.data else None)

    def _from_config(self, path: str) -> tuple[Any, Any]:
        model, data = self._classes()
        try:
            return config.build(path, model, self.model_arguments, data, self.data_arguments)
        except Exception as error:
            raise TargetError(f"{path}: {type(error).__name__}: {_first_line(error)}") from error

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


# -- class paths ------------------------------------------------------------------------------------------------------


def load(path: str) -> Callable[..., Any]:
    """The class or function at a class path. Raises TargetError, with the names that are like it."""
    _importable(Path.cwd())
    place, colon, name = path.rpartition(":")
    if not colon:
        if "." not in path:
            raise TargetError(f"{path!r} is no class path: write package.module:Class or folder/file.py:Class.")
        module, name = _longest_module(path)
    elif place.endswith(".py"):
        module = _module_of_file(Path(place), path)
    else:
        module = _module(place, path)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise TargetError(f"{path!r}: {_title(found)} has no {part}. {nearest(part, _callables(found), 'It has')}")
        found = getattr(found, part)
    if not callable(found):
        raise TargetError(f"{path!r} is {found!r}: neither a class nor a function. Name one of these.")
    return found


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def _module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise _import_failed(name, path, error) from error
        parent, _, last = error.name.rpartition(".")
        where = importlib.import_module(parent) if parent else None
        known = sorted(_submodules(where))
        inside = f" in {parent}" if parent else " here or installed"
        raise TargetError(
            f"{path!r}: there is no module {error.name}{inside}. {nearest(last, known, 'There are')}"
        ) from None
    except Exception as error:
        raise _import_failed(name, path, error) from error


def _longest_module(path: str) -> tuple[ModuleType, str]:
    """`package.module.Class.Nested` as the module and the name in it."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found = importlib.util.find_spec(name) is not None
        except (ImportError, ValueError, AttributeError):  # its parent is a class, or not there either
            found = False
        if found:
            return _module(name, path), ".".join(parts[cut:])
    return _module(parts[0], path), ".".join(parts[1:])


def _module_of_file(file: Path, path: str) -> ModuleType:
    file = file.resolve()
    if not file.is_file():
        known = sorted(other.name for other in file.parent.glob("*.py")) if file.parent.is_dir() else []
        raise TargetError(f"{path!r}: there is no file {file}. {nearest(file.name, known, 'Beside it there are')}")
    _importable(file.parent)
    name = file.stem
    known_module = sys.modules.get(name)
    if known_module is not None and Path(getattr(known_module, "__file__", None) or "").resolve() == file:
        return known_module
    if known_module is not None or not name.isidentifier():
        name = f"_target_{abs(hash(file))}"
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, as the import system does: pickling and type hints look here
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _import_failed(str(file), path, error) from error
    return module


def _import_failed(name: str, path: str, error: Exception) -> TargetError:
    return TargetError(f"{path!r}: importing {name} failed with {type(error).__name__}: {_first_line(error)}")


def _submodules(package: ModuleType | None) -> set[str]:
    """Names that could have been meant: of a package's modules, or of those in the current directory."""
    folders = [str(Path.cwd())] if package is None else list(getattr(package, "__path__", []))
    names = {module.name for module in pkgutil.iter_modules(folders)}
    for folder in map(Path, folders):
        names |= {inner.name for inner in folder.iterdir() if inner.is_dir() and any(inner.glob("*.py"))}
    return {name for name in names if name.isidentifier()}


def _callables(where: Any) -> list[str]:
    """The classes and functions that are defined there."""
    home = where.__name__ if isinstance(where, ModuleType) else getattr(where, "__module__", None)
    return [
        name
        for name, value in vars(where).items()
        if (inspect.isclass(value) or inspect.isfunction(value))
        and value.__module__ == home
        and not name.startswith("_")
    ]


def _title(found: Any) -> str:
    return f"module {found.__name__}" if isinstance(found, ModuleType) else getattr(found, "__qualname__", repr(found))


# -- making the objects -----------------------------------------------------------------------------------------------


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
            f"{_call(path, {name: repr(value) for name, value in arguments.items()})} raised "
            f"{type(error).__name__}: {_first_line(error)}"
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
    what = "an nn.Module" if issubclass(cls, nn.Module) else f"a {cls.__qualname__}"
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


def _first_line(error: BaseException) -> str:
    lines: Iterable[str] = str(error).strip().splitlines()
    return next(iter(lines), "")
