"""JSON to frozen dataclasses: every value is checked against the type that its field declares.

Nothing in the JSON is executed or looked up by name but members of the enumerations. What does not fit is a ValueError
that says where, what was found and what belongs there.
"""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

Figure = TypeVar("Figure")

_LARGEST = (1 << 63) - 1


def decode(kind: type[Figure], content: object, where: str = "") -> Figure:
    """`content` as a `kind`: a dataclass whose fields are numbers, strings, enumerations, tuples, mappings and others.

    A field that `content` lacks has its default; keys that are no field are ignored. Raises ValueError.
    """
    if not isinstance(content, dict):
        raise _wrong(where, content, "an object")
    hints = get_type_hints(kind)
    values = {}
    for field in fields(kind):  # type: ignore[arg-type]
        place = f"{where}.{field.name}" if where else field.name
        if field.name in content:
            values[field.name] = _value(hints[field.name], content[field.name], place)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{place} is missing")
    return kind(**values)


def _value(kind: Any, content: Any, where: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, UnionType):
        if content is None and NoneType in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not NoneType)
        return _value(kind, content, where)
    if origin is tuple:
        return _tuple(arguments, content, where)
    if origin is Mapping:
        if not isinstance(content, dict):
            raise _wrong(where, content, "an object")
        keys, values = arguments
        return {_value(keys, key, where): _value(values, item, f"{where}[{key!r}]") for key, item in content.items()}
    if is_dataclass(kind):
        return decode(kind, content, where)  # type: ignore[arg-type]
    return _scalar(kind, content, where)


def _tuple(arguments: tuple[Any, ...], content: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(content, list):
        raise _wrong(where, content, "a list")
    if arguments[-1] is not Ellipsis and len(content) != len(arguments):
        raise _wrong(where, content, f"a list of {len(arguments)}")
    kinds = arguments if arguments[-1] is not Ellipsis else arguments[:1] * len(content)
    return tuple(
        _value(kind, item, f"{where}[{index}]") for index, (kind, item) in enumerate(zip(kinds, content, strict=True))
    )


def _scalar(kind: Any, content: Any, where: str) -> Any:
    if issubclass(kind, Enum):
        members = {member.value: member for member in kind}
        if not isinstance(content, str) or content not in members:
            raise _wrong(where, content, f"one of {', '.join(members)}")
        return members[content]
    if kind is int:
        if type(content) is not int or abs(content) > _LARGEST:
            raise _wrong(where, content, "a whole number of 64 bits")
    elif kind is float:
        if type(content) not in (int, float) or not math.isfinite(content):
            raise _wrong(where, content, "a number")
    elif not isinstance(content, kind):
        raise _wrong(where, content, "a string" if kind is str else kind.__name__)
    return content


def _wrong(where: str, content: object, expected: str) -> ValueError:
    shown = repr(content)
    if len(shown) > 40:
        shown = shown[:37] + "..."
    return ValueError(f"{where or 'the whole'} is {shown}, not {expected}")
