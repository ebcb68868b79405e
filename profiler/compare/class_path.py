"""Class paths: `package.module:Class`, `package.module.Class` or `folder/file.py:Class` to the class, or the function.

The current directory can be imported from, as with `python -m`; so can the folder of a file, as with
`python folder/file.py`. Where a name is not there, the error says which are like it.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .arguments import nearest


class TargetError(ValueError):
    """What is to be trained cannot be had as it is written. One line says why and what would do."""


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
    return TargetError(f"{path!r}: importing {name} failed with {one_line(error)}")


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


def one_line(error: BaseException) -> str:
    """The error's type and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
