"""Sizes, shares and names in words: for whatever is read by eyes. The only place that knows GiB."""

from collections.abc import Iterable

from ..category import Category

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(size: int) -> str:
    """`size` bytes in the largest unit of which there is at least one: '1.50 GiB'."""
    unit_bytes, unit = unit_of(size)
    return f"{size} B" if unit_bytes == 1 else f"{size / unit_bytes:.2f} {unit}"


def unit_of(size: int) -> tuple[int, str]:
    """The bytes in the largest unit of which `size` has at least one, and its name: what an axis is marked in."""
    unit = 0
    while abs(size) >= 1024 ** (unit + 1) and unit < len(_UNITS) - 1:
        unit += 1
    return 1024**unit, _UNITS[unit]


def format_in(unit_bytes: int, size: int) -> str:
    """`size` bytes in a unit that is named elsewhere: '1.50'; '<0.01' of less, and '' of nothing."""
    value = size / unit_bytes
    return "" if not size else "<0.01" if value < 0.01 else f"{value:.2f}"


def format_share(part: float, whole: float) -> str:
    """`part` of `whole` in per cent: '34.1%'. Nothing of nothing is ''."""
    return f"{part / whole:.1%}" if whole else ""


def format_saving(base: int, size: int, peak_bytes: int) -> str:
    """What `size` saves against `base`, as a share of the peak: '34.1%'. Too little to see is ''."""
    saved = format_share(base - size, peak_bytes)
    return "" if saved in ("0.0%", "-0.0%") else saved


def printable(text: str) -> str:
    """`text` on one line and without what a terminal would obey. Names in a report come from whoever wrote it."""
    return "".join(character if character.isprintable() else "?" for character in text)


def spoken(name: str) -> str:
    """A phase's or a category's name as one says it: 'optimizer step'."""
    return printable(name).replace("_", " ")


def in_words(category: Category) -> str:
    return spoken(category.value)


def format_shape(shape: Iterable[int] | None) -> str:
    """'8x256x512'; of a scalar 'scalar', and nothing where it is not known."""
    return "" if shape is None else "x".join(map(str, shape)) or "scalar"


def count_of(number: int, thing: str) -> str:
    """'1 step', '3 steps'."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
