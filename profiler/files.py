"""Where files go: folders are made, and a file that cannot be written costs a warning, never the run."""

import warnings
from collections.abc import Callable
from pathlib import Path


def made_path(path: str | Path) -> Path:
    """`path` with its folder made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def keep(what: str, save: Callable[[Path], None], path: str | Path) -> None:
    """Have `save` write `what` to `path`. Where the system refuses, a warning says why: training is worth more."""
    try:
        save(made_path(path))
    except OSError as error:
        warnings.warn(f"{what} was not written to {path}: {error.strerror or error}.", stacklevel=3)
