"""Dataclasses and named tuples as JSON, and back: every value is then checked against the type that its field declares.

Nothing in the JSON is executed or looked up by name but members of the enumerations. What does not fit is a ValueError
that says where, what was found and what belongs there.

A trace has millions of rows, so what a type asks for is worked out once for the type, and where something lies is put
together only for what does not fit.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Figure = TypeVar("Figure")
Decoder = Callable[[Any], Any]

_LARGEST = (1 << 63) - 1
_SCALARS = (int, float, str, bool, NoneType)


def encode(value: Any) -> Any:
    """What `decode` reads, as dictionaries, lists, strings and numbers."""
    if type(value) in _SCALARS:  # nearly always
        return value
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {encode(key): encode(item) for key, item in value.items()}
    return {field.name: encode(getattr(value, field.name)) for field in fields(value)}


class _Misfit(ValueError):
    """What was found does not fit. `place` grows from the inside out."""

    def __init__(self, what: str, place: str = "") -> None:
        self.what, self.place = what, place

    def within(self, place: str) -> "_Misfit":
        return _Misfit(self.what, place + self.place)

    def __str__(self) -> str:
        return f"{self.place.removeprefix('.') or 'the whole'} is {self.what}"


def decode(kind: type[Figure], content: object) -> Figure:
    """`content` as a `kind`: a dataclass whose fields are numbers, strings, enumerations, lists, mappings and others.

    A named tuple is a list in JSON. A field that `content` lacks has its default; keys that are no field are ignored.
    Raises ValueError.
    """
    figure: Figure = _decoder(kind)(content)  # type: ignore[arg-type]  # mypy does not see that classes are hashable
    return figure


@cache
def _decoder(kind: Any) -> Decoder:
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, UnionType):
        (other,) = (argument for argument in arguments if argument is not NoneType)
        return _or_none(_decoder(other))
    if origin is list:
        return _sequence(list, _decoder(arguments[0]))
    if origin is tuple and arguments[-1] is Ellipsis:
        return _sequence(tuple, _decoder(arguments[0]))
    if origin is tuple:
        return _row(lambda *values: values, [_decoder(argument) for argument in arguments])
    if origin in (Mapping, dict):
        return _mapping(*map(_decoder, arguments))
    if is_dataclass(kind):
        return _dataclass(kind)
    if issubclass(kind, tuple):
        hints = get_type_hints(kind)
        return _row(kind, [_decoder(hints[name]) for name in kind._fields], len(kind._field_defaults))
    if issubclass(kind, Enum):
        return _enumeration(kind)
    return {int: _whole_number, float: _number}.get(kind) or _instance(kind)


def _dataclass(kind: Any) -> Decoder:
    hints = get_type_hints(kind)
    of = {field.name: _decoder(hints[field.name]) for field in fields(kind)}
    needed = [one.name for one in fields(kind) if one.default is MISSING and one.default_factory is MISSING]

    def figure(content: Any) -> Any:
        values: dict[str, Any] = {}
        for name, item in _object(content).items():
            if name in of:
                try:
                    values[name] = of[name](item)
                except _Misfit as misfit:
                    raise misfit.within(f".{name}") from None
        for name in needed:
            if name not in values:
                raise _Misfit("missing", f".{name}")
        return kind(**values)

    return figure


def _mapping(key: Decoder, value: Decoder) -> Decoder:
    def mapping(content: Any) -> Any:
        values = {}
        for name, item in _object(content).items():
            known = key(name)
            try:
                values[known] = value(item)
            except _Misfit as misfit:
                raise misfit.within(f"[{name!r}]") from None
        return values

    return mapping


def _sequence(kind: Callable[[list[Any]], Any], of: Decoder) -> Decoder:
    def sequence(content: Any) -> Any:
        if not isinstance(content, list):
            raise _wrong(content, "a list")
        values: list[Any] = []
        try:
            for item in content:
                values.append(of(item))
        except _Misfit as misfit:
            raise misfit.within(f"[{len(values)}]") from None
        return kind(values)

    return sequence


def _row(kind: Callable[..., Any], of: list[Decoder], optional: int = 0) -> Decoder:
    most = len(of)

    def row(content: Any) -> Any:
        if not isinstance(content, list) or not most - optional <= len(content) <= most:
            raise _wrong(content, f"a list of {most}")
        values: list[Any] = []
        try:
            for decoder, item in zip(of, content, strict=False):
                values.append(decoder(item))
        except _Misfit as misfit:
            raise misfit.within(f"[{len(values)}]") from None
        return kind(*values)

    return row


def _or_none(of: Decoder) -> Decoder:
    return lambda content: None if content is None else of(content)


def _enumeration(kind: type[Enum]) -> Decoder:
    members = {member.value: member for member in kind}

    def member(content: Any) -> Any:
        if not isinstance(content, str) or content not in members:
            raise _wrong(content, f"one of {', '.join(members)}")
        return members[content]

    return member


def _instance(kind: type) -> Decoder:
    def instance(content: Any) -> Any:
        if not isinstance(content, kind):
            raise _wrong(content, "a string" if kind is str else kind.__name__)
        return content

    return instance


def _whole_number(content: Any) -> int:
    if type(content) is not int or not -_LARGEST <= content <= _LARGEST:
        raise _wrong(content, "a whole number of 64 bits")
    return content


def _number(content: Any) -> float:
    if type(content) not in (int, float) or not math.isfinite(content):
        raise _wrong(content, "a number")
    number: float = content
    return number


def _object(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise _wrong(content, "an object")
    return content


def _wrong(content: object, expected: str) -> _Misfit:
    shown = repr(content)
    if len(shown) > 40:
        shown = shown[:37] + "..."
    return _Misfit(f"{shown}, not {expected}")
