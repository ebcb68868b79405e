"""Sizes and shares in words: for whatever is read by eyes. With the renderers, the only place that knows GiB."""

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def format_bytes(size: int) -> str:
    """`size` bytes in the largest unit of which there is at least one: '1.50 GiB'."""
    value, unit = float(size), 0
    while abs(value) >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{size} B" if unit == 0 else f"{value:.2f} {_UNITS[unit]}"


def format_share(part: float, whole: float) -> str:
    """`part` of `whole` in per cent: '34.1%'. Nothing of nothing is ''."""
    return f"{part / whole:.1%}" if whole else ""
