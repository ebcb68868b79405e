"""Constructor arguments as text: what `--model.NAME VALUE` means, by the constructor's own signature.

| annotation | what is read |
| --- | --- |
| `str` | the text as it is |
| `int`, `float` | a number |
| `bool` | true, false, yes, no, 1 or 0 |
| `X \\| None`, `Union` | None, none or null; else the first member that can read it, `str` last |
| `Literal`, an `Enum` | one of its values; of an Enum the name too |
| `list`, `tuple`, `dict`, `set`, `Sequence`, `Mapping` | a Python literal; its items by their annotation |
| `Path`, `torch.dtype` | a path; a name such as `float16` |
| none, `Any` | a Python literal, else the text |

Anything else is taken where a Python literal gives an instance of it, and refused otherwise.
"""

import ast
import inspect
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union

import torch

_EMPTY = inspect.Parameter.empty
_NONE = ("None", "none", "null")
_BOOLS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
_PATIENT = (types.NoneType, int, bool, float, Any, str, Path)
"""The members of a Union that read more than their own, each more than those before it: asked in this order, after
all others but None, so that `1` is an int before it is a bool, and text is what nothing else can read."""

_BASES = ("torch.nn.modules.module", "lightning.pytorch.core.", "lightning.fabric.")
"""Where the bases are whose `__init__` takes **kwargs and makes nothing of them."""


def parameters_of(constructor: Callable[..., Any]) -> tuple[dict[str, inspect.Parameter], bool]:
    """The arguments that can be given by name, annotations resolved, and whether any other name is taken too.

    Where a class's `__init__` has `**kwargs`, those of the classes that it inherits from are among them.
    """
    found: dict[str, inspect.Parameter] = {}
    takes_any = False
    for function in _functions(constructor):
        try:
            own = list(inspect.signature(function).parameters.values())
        except ValueError:  # written in C
            return found, True
        hints = _hints(function)
        for parameter in own[1:] if inspect.isclass(constructor) else own:  # the first is the instance, by any name
            name = parameter.name
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                continue
            if parameter.kind is not parameter.POSITIONAL_ONLY:
                found.setdefault(name, parameter.replace(annotation=hints.get(name, parameter.annotation)))
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in own)
        if not takes_any:
            break
    return found, takes_any


def read_arguments(constructor: Callable[..., Any], given: Mapping[str, str], option: str) -> dict[str, Any]:
    """The values of `given` (name -> text) for `constructor`.

    Args:
        constructor: a class, or a function.
        given: the texts by argument name.
        option: what stands before the names on the command line, for errors: `--model`.

    Raises:
        ValueError: a name that is not an argument, a text that its type cannot be read from, an argument without a
            default that is not given.
    """
    check_names(constructor, given, option)
    parameters, _ = parameters_of(constructor)
    missing = [name for name, p in parameters.items() if p.default is _EMPTY and name not in given]
    if missing:
        raise ValueError(
            f"{_name(constructor)} needs {', '.join(missing)}: give "
            f"{' '.join(f'{option}.{name} VALUE' for name in missing)}."
        )
    values: dict[str, Any] = {}
    for name, text in given.items():
        annotation = parameters[name].annotation if name in parameters else _EMPTY
        if text in _NONE and name in parameters and parameters[name].default is None:
            values[name] = None  # `x: int = None` means `int | None`
            continue
        try:
            values[name] = read_value(text, annotation)
        except ValueError as error:
            raise ValueError(f"{option}.{name} {text!r} {error}.") from None
    return values


def check_names(constructor: Callable[..., Any], names: Iterable[str], option: str) -> None:
    """ValueError for a name that is not an argument of `constructor`, with those that are like it."""
    parameters, takes_any = parameters_of(constructor)
    for name in names:
        if name not in parameters and not takes_any:
            raise ValueError(
                f"{option}.{name} is not an argument of {_name(constructor)}. {nearest(name, parameters, 'It takes')}"
            )


def nearest(name: str, known: Collection[str], otherwise: str) -> str:
    """The sentence that helps who wrote `name`: what of `known` is like it, else all that are known."""
    like = get_close_matches(name, known, n=3, cutoff=0.6)
    if like:
        return f"Did you mean {' or '.join(like)}?"
    return f"{otherwise} {', '.join(known) if known else 'none'}."


def read_value(text: str, annotation: Any = _EMPTY) -> Any:
    """The value that `text` stands for where `annotation` is asked for. Raises ValueError, as half a sentence."""
    if annotation in (_EMPTY, Any, object):
        return _literal_or_text(text)
    if annotation is str:
        return text
    if annotation is bool:
        if text.lower() not in _BOOLS:
            raise ValueError("is not true or false")
        return _BOOLS[text.lower()]
    if annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            raise ValueError(f"is not {'an int' if annotation is int else 'a float'}") from None
    if annotation in (None, types.NoneType):
        if text not in _NONE:
            raise ValueError("is not none")
        return None
    if annotation is torch.dtype:
        return _dtype(text)
    if annotation is Path:
        return Path(text)
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return _union(text, typing.get_args(annotation))
    if origin is Literal:
        return _one_of(text, {str(choice): choice for choice in typing.get_args(annotation)})
    if origin is typing.Annotated:
        return read_value(text, typing.get_args(annotation)[0])
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return _one_of(text, {key: member for member in annotation for key in (member.name, str(member.value))})
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise ValueError(f"is not a Python literal of type {_type_name(annotation)}") from None
    return _fit(value, annotation)


def _fit(value: Any, annotation: Any) -> Any:
    """A value out of a Python literal, as the annotation wants it: a tuple as a list, an int as a float."""
    if annotation in (_EMPTY, Any, object) or isinstance(annotation, typing.TypeVar):
        return value
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    wrong = ValueError(f"is not of type {_type_name(annotation)}")
    if origin in (Union, types.UnionType):
        for member in _patient_first(arguments):
            try:
                return _fit(value, member)
            except ValueError:
                continue
        raise wrong
    if origin is Literal:
        if value not in arguments:
            raise wrong
        return value
    if annotation in (None, types.NoneType):
        origin = types.NoneType
    if origin is float and type(value) is int:
        return float(value)
    if not isinstance(origin, type) or not _fits(value, origin):
        raise wrong
    if isinstance(value, dict):
        key, item = arguments or (Any, Any)
        return {_fit(k, key): _fit(v, item) for k, v in value.items()}
    if isinstance(value, tuple | list | set | frozenset):
        fixed = origin is tuple and bool(arguments) and arguments[-1] is not ...
        if fixed and len(arguments) != len(value):
            raise ValueError(f"has {len(value)} items, and {_type_name(annotation)} has {len(arguments)}")
        each: Iterable[Any] = arguments if fixed else [arguments[0] if arguments else Any] * len(value)
        made = origin if origin in (tuple, list, set, frozenset) else type(value)
        return made(_fit(item, one) for item, one in zip(value, each, strict=True))
    return value


def _fits(value: Any, kind: type) -> bool:
    if kind in (list, tuple):
        return isinstance(value, list | tuple)  # `1, 2` is a tuple to Python, and a list to who wrote it
    if issubclass(kind, set | frozenset):
        return isinstance(value, set | frozenset)
    if isinstance(value, str) and issubclass(kind, Collection | Iterable) and kind is not str:
        return False  # a text is a sequence of characters, which no one means
    return isinstance(value, kind) and not (isinstance(value, bool) and kind in (int, float))


def _union(text: str, members: Sequence[Any]) -> Any:
    reasons = []
    for member in _patient_first(members):
        try:
            return read_value(text, member)
        except ValueError as error:
            reasons.append(str(error))
    raise ValueError(" and ".join(dict.fromkeys(reasons)))


def _patient_first(members: Sequence[Any]) -> list[Any]:
    def rank(member: Any) -> float:
        return next((i for i, kind in enumerate(_PATIENT) if member is kind), 0.5)

    return sorted(members, key=rank)


def _one_of(text: str, choices: Mapping[str, Any]) -> Any:
    if text not in choices:
        raise ValueError(f"is not one of {', '.join(choices)}")
    return choices[text]


def _dtype(text: str) -> torch.dtype:
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError("is not the name of a torch.dtype, such as float16")
    return dtype


def _literal_or_text(text: str) -> Any:
    if text in _NONE:
        return None
    if text in ("true", "false"):
        return text == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _functions(constructor: Callable[..., Any]) -> list[Callable[..., Any]]:
    """The functions whose arguments `constructor` may take: of a class, every `__init__` that it inherits."""
    if not inspect.isclass(constructor):
        return [constructor]
    own = [cls.__dict__["__init__"] for cls in constructor.__mro__ if cls is not object and "__init__" in cls.__dict__]
    return [init for init in own if not str(getattr(init, "__module__", "")).startswith(_BASES)]


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function, include_extras=True)
    except Exception:
        # A name that exists only for a type checker. Annotations that are no text still hold.
        own = getattr(function, "__annotations__", {})
        return {name: _EMPTY if isinstance(hint, str) else hint for name, hint in own.items()}


def _name(constructor: Callable[..., Any]) -> str:
    return getattr(constructor, "__qualname__", repr(constructor))


def _type_name(annotation: Any) -> str:
    plain = isinstance(annotation, type) and not typing.get_args(annotation)
    return annotation.__qualname__ if plain else str(annotation)
