"""Damage done to what was saved: for the tests of reading it."""

import copy
from typing import Any

from hypothesis import strategies as st

Place = tuple[Any, ...]
Change = tuple[Place, Any]

REMOVED = object()
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def changes(valid: Any, *values: Any) -> st.SearchStrategy[list[Change]]:
    """Some changes anywhere in `valid`: removals, anything at all, and `values`, which are of a type that fits."""
    new = st.just(REMOVED) | ANYTHING | st.sampled_from([0, "net.h.0", *values])
    return st.lists(st.tuples(st.sampled_from(places(valid)), new), min_size=1, max_size=4)


def damaged(valid: Any, changes: list[Change]) -> Any:
    """A copy of `valid` with the changes made."""
    result = copy.deepcopy(valid)
    for (*above, last), value in changes:
        at: Any = result
        try:
            for key in above:
                at = at[key]
            if value is REMOVED:
                del at[last]
            else:
                at[last] = value
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change took away where this one belongs
    return result


def places(value: Any, above: Place = ()) -> list[Place]:
    """Where anything is in nested objects and lists."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*above, key), *places(item, (*above, key)))]
