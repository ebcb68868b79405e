"""Text to values, by annotation."""

import contextlib
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_mpt.profiler.compare.arguments import parameters_of, read_arguments, read_value

from .trained import Keywords, Kind, Tiny, Typed


@given(st.integers())
def test_every_int_is_read(value: int) -> None:
    assert read_value(str(value), int) == value
    assert read_value(str(value), Union[int, str]) == value  # noqa: UP007
    assert read_value(str(value)) == value


@given(st.floats(allow_nan=False))
def test_every_float_is_read(value: float) -> None:
    assert read_value(repr(value), float) == value
    assert read_value(repr(value), Optional[float]) == value  # noqa: UP045


@given(st.text())
def test_text_is_left_as_it_is(text: str) -> None:
    assert read_value(text, str) == text
    assert isinstance(read_value(text, str | int), str | int)


@given(st.text())
def test_whatever_is_written_is_read_or_refused(text: str) -> None:
    for annotation in (int, float, bool, list[int], dict[str, float], Literal["a"], Kind, torch.dtype, int | None):
        with contextlib.suppress(ValueError):
            read_value(text, annotation)
    read_value(text)  # without an annotation everything is read


nested = st.recursive(st.integers() | st.text() | st.booleans() | st.none(), lambda x: st.lists(x, max_size=3))


@given(st.lists(nested))
def test_a_list_is_a_python_literal(value: list[Any]) -> None:
    assert read_value(repr(value), list) == value
    assert read_value(repr(tuple(value)), list) == value
    assert read_value(repr(value), list[Any]) == value


@given(st.dictionaries(st.text(), st.lists(st.integers())))
def test_a_dict_is_a_python_literal(value: dict[str, list[int]]) -> None:
    assert read_value(repr(value), dict[str, list[int]]) == value


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("1", int | bool | str, 1),
        ("true", int | bool | str, True),
        ("word", int | bool | str, "word"),
        ("1", bool, True),
        ("No", bool, False),
        ("none", int | None, None),
        ("None", Any, None),
        ("3", Literal["fast", 3], 3),
        ("FANCY", Kind, Kind.FANCY),
        ("f", Kind, Kind.FANCY),
        ("1, 2", list[int], [1, 2]),
        ("1, 2", tuple[int, ...], (1, 2)),
        ("[1, 2]", tuple[float, int], (1.0, 2)),
        ("(1, None)", list[int | None], [1, None]),
        ("['a', 'b']", list[Literal["a", "b"]], ["a", "b"]),
        ("{1, 2}", set[int], {1, 2}),
        ("bfloat16", torch.dtype, torch.bfloat16),
        ("torch.float16", torch.dtype, torch.float16),
        ("a/b", Path, Path("a/b")),
        ("7", Annotated[int, "of something"], 7),
        ("inf", float, float("inf")),
        ("true", Any, True),
        ("(1, 'x')", Any, (1, "x")),
    ],
)
def test_values(text: str, annotation: Any, value: Any) -> None:
    read = read_value(text, annotation)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "annotation", "said"),
    [
        ("1.5", int, "is not an int"),
        ("x", float, "is not a float"),
        ("maybe", bool, "is not true or false"),
        ("x", int | None, "is not none and is not an int"),
        ("x", Literal["fast", 3], "is not one of fast, 3"),
        ("x", Kind, "is not one of PLAIN, p, FANCY, f"),
        ("double precision", torch.dtype, "is not the name of a torch.dtype"),
        ("(1, 2)", tuple[int, int, int], "has 2 items, and tuple[int, int, int] has 3"),
        ("['a']", list[int], "is not of type int"),
        ("[True]", list[int], "is not of type int"),
        ("'abc'", list[str], "is not of type list[str]"),
        ("[1", list[int], "is not a Python literal of type list[int]"),
        ("3", Tiny, "is not of type Tiny"),
        ("x", Tiny, "is not a Python literal of type Tiny"),
    ],
)
def test_what_cannot_be_read(text: str, annotation: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("[", r"\[")):
        read_value(text, annotation)


def test_a_constructor_s_annotations_say_what_is_read() -> None:
    given = {
        "count": "3",
        "either": "x",
        "maybe": "none",
        "sizes": "[1, 2]",
        "pair": "1, 2",
        "table": "{'a': 1}",
        "mode": "slow",
        "kind": "p",
        "folder": "here",
        "dtype": "float16",
        "implicit": "none",
        "untyped": "text",
    }
    assert read_arguments(Typed, given, "--model") == {
        "count": 3,
        "either": "x",
        "maybe": None,
        "sizes": [1, 2],
        "pair": (1, 2.0),
        "table": {"a": 1.0},
        "mode": "slow",
        "kind": Kind.PLAIN,
        "folder": Path("here"),
        "dtype": torch.float16,
        "implicit": None,
        "untyped": "text",
    }


def test_what_is_passed_on_is_known_by_the_classes_inherited_from() -> None:
    parameters, takes_any = parameters_of(Keywords)
    assert list(parameters) == ["depth", "width", "lr", "bias"]
    assert not takes_any
    assert read_arguments(Keywords, {"depth": "1", "width": "2"}, "--model") == {"depth": 1, "width": 2}


def test_the_instance_is_no_argument_whatever_it_is_called() -> None:
    class Terse:
        def __init__(this, width: int = 1) -> None: ...

    class Inheriting(Terse):
        def __init__(me, depth: int, **kwargs: Any) -> None: ...

    def make(self: int, width: int) -> None: ...

    assert list(parameters_of(Inheriting)[0]) == ["depth", "width"]
    assert list(parameters_of(make)[0]) == ["self", "width"]  # a function is called with all that it names


def test_what_is_required_is_named() -> None:
    with pytest.raises(ValueError, match=r"Keywords needs depth: give --model.depth VALUE\."):
        read_arguments(Keywords, {}, "--model")
