"""Who may know whom: the profiler nothing of the rest, nobody but a few Lightning, and Triton one folder alone."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]


def imported(path: Path) -> Iterator[str]:
    """The names of modules that a file imports, relative ones with their dots, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


def importers(folder: str, package: str) -> set[str]:
    """The files of a folder that import a package, or what is in it."""
    return {
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / folder).rglob("*.py"))
        if any(name.split(".")[0] == package for name in imported(path))
    }


def test_the_profiler_knows_nothing_of_the_rest() -> None:
    assert importers("profiler", "lightning_mpt") == set()
    for path in (ROOT / "profiler").rglob("*.py"):
        above = len(path.relative_to(ROOT / "profiler").parts) + 1  # so many dots lead out of the folder
        assert not [name for name in imported(path) if name.startswith("." * above)], path


def test_of_the_rest_the_command_line_alone_knows_the_profiler() -> None:
    for path in (ROOT / "lightning_mpt").rglob("*.py"):
        if "cli" not in path.parts:
            assert not [name for name in imported(path) if "profiler" in name], path


def test_triton_is_in_its_own_folder_and_lightning_where_it_is_plugged_in() -> None:
    triton = importers("lightning_mpt", "triton")
    assert triton
    assert {str(Path(name).parent) for name in triton} == {"lightning_mpt/kernels/triton"}
    assert importers("lightning_mpt", "lightning") == {
        "lightning_mpt/callbacks.py",
        "lightning_mpt/cli/imagined.py",
        "lightning_mpt/fabric.py",
        "lightning_mpt/gradient_histogram.py",
        "lightning_mpt/precision.py",
    }
