"""The README's commands are those that CI runs, and its files exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CI = ROOT / ".ci" / "run"


def commands() -> list[str]:
    """The lines of the README's shell blocks that set up and run, comments left out."""
    blocks = re.findall(r"```(?:bash|sh)\n(.*?)```", README, flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("pip install")]


def test_two_commands_set_up_and_run_everything() -> None:
    assert commands() == [
        'pip install -e ".[examples]" && python examples/train_gpt.py',
        'pip install -e ".[dev]" && python -m pytest -n auto --dist loadfile',
    ]


def test_ci_runs_the_readmes_test_command_word_for_word() -> None:
    lines = [line.strip() for line in CI.read_text(encoding="utf-8").splitlines()]
    assert commands()[1] in lines


def test_ci_is_executable_and_stops_at_the_first_failure() -> None:
    assert CI.stat().st_mode & 0o111
    assert "set -euo pipefail" in CI.read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "docs/index.md"])
def test_linked_files_exist(document: str) -> None:
    path = ROOT / document
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text(encoding="utf-8"))
    local = [link for link in links if not link.startswith("http")]
    assert local
    assert [link for link in local if not (path.parent / link).exists()] == []
