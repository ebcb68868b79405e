"""What README and docs say is what the kept results say."""

import json
import re
from pathlib import Path

import pytest

from benchmarks.common import RESULTS
from benchmarks.numbers import NUMBERS, PAGES, filled, number


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_says_what_the_results_say(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert filled(text) == text, "run python -m benchmarks.numbers"


@pytest.mark.parametrize("name", NUMBERS)
def test_every_number_stands_on_a_page(name: str) -> None:
    assert any(f"<!-- numbers: {name} -->" in page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize("path", sorted(RESULTS.glob("[!.]*.json")), ids=lambda path: path.stem)
def test_a_result_says_where_it_is_from(path: Path) -> None:
    where = json.loads(path.read_text(encoding="utf-8"))["environment"]
    assert re.fullmatch(r"[0-9a-f]{40}", where["commit"]), "measured with changes that are in no commit"
    assert where["command"].startswith("python -m benchmarks.")
    assert where["cpu"]
    assert where["versions"]["torch"]


def test_what_was_not_measured_says_so(tmp_path: Path) -> None:
    assert number("memory", tmp_path) == "Not measured yet: `python -m benchmarks.memory`."


def test_a_changed_result_changes_the_page(tmp_path: Path) -> None:
    text = "<!-- numbers: profiler -->\n<!-- /numbers -->"
    result = json.loads((RESULTS / "profiler_cpu.json").read_text(encoding="utf-8"))
    result["peak"][0]["recorder_error"] = 0.25
    (tmp_path / "profiler_cpu.json").write_text(json.dumps(result), encoding="utf-8")
    assert "25.00%" in filled(text, tmp_path)
    assert "25.00%" not in filled(text)
