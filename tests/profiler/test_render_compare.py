"""The comparison's tables, on rows made by hand: what they say, and that they fit."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from lightning_mpt.profiler.compare.run import FAILED, OUT_OF_MEMORY, Row, to_json
from lightning_mpt.profiler.show.comparison import print_rows

from .test_claims import report

MIB = 1 << 20
FULL = report(weights=100 * MIB, gradients=200 * MIB, optimizer_state=200 * MIB, activations=700 * MIB)
HALF = report(weights=50 * MIB, master_weights=50 * MIB, optimizer_state=200 * MIB, activations=350 * MIB)
ROWS = [
    Row("32-true", "ok", FULL, 0.5),
    Row("16-mixed", FAILED, error="ValueError: `Trainer(precision='16-mixed')` is not there on a CPU."),
    Row("bf16-true", OUT_OF_MEMORY, error="OutOfMemoryError: CUDA out of memory."),
    Row("mpt-bf16-true", "ok", replace(HALF, notes=("A note.",)), 1.25),
    Row("mpt-bf16-true:compact", "ok", report(activations=1300 * MIB)),
]


def shown(width: int, rows: list[Row] = ROWS) -> list[str]:
    out = io.StringIO()
    print_rows(rows, "a:Model on cpu", Console(file=out, width=width, color_system=None))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_the_tables_fit_and_say_what_matters(width: int) -> None:
    lines = shown(width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for said in ("a:Model on cpu", "1.17 GiB", "650.00 MiB", "550.00 MiB", "45.8%", "-8.3%", "500.0 ms", "1.25 s"):
        assert said in text
    for name in ("failed", "out of memory", "compact"):
        assert name in text
    words = " ".join(text.split())
    assert "16-mixed failed: ValueError" in words
    assert "bf16-true out of memory: OutOfMemoryError: CUDA out of memory." in words
    assert "mpt-bf16-true: A note." in words


def test_there_are_as_few_tables_as_the_width_allows() -> None:
    assert [sum(line.startswith("┏") for line in shown(width)) for width in (40, 60, 100, 200)] == [5, 2, 1, 1]


@pytest.mark.parametrize("width", [60, 80])
def test_further_lines_take_room_from_the_precisions(width: int) -> None:
    out = io.StringIO()
    more = {"largest batch in 24MiB": dict.fromkeys((row.precision for row in ROWS), "16")}
    print_rows(ROWS, "a:Model", Console(file=out, width=width, color_system=None), more=more)
    assert "…" not in out.getvalue()
    assert all(line.endswith("│") for line in out.getvalue().splitlines() if line.startswith("│"))


def test_a_wide_table_has_each_name_on_one_line() -> None:
    (heading,) = [line for line in shown(200) if "category" in line]
    assert all(row.precision in heading for row in ROWS)


def test_what_is_usually_said_is_held_against_fp32() -> None:
    text = " ".join(" ".join(shown(200)).split())
    assert "✗ activations 58.3% of the FP32 peak; usually said: 60% to 80%. Here weights, gradients" in text
    assert "✗ gradients 16.7%" in text
    assert "✓ weights 8.3% of the FP32 peak; usually said: 5% to 10%" in text
    assert "optimizer state 16.7%, which the usual figures leave out" in text
    assert "✓ saved by mpt-bf16-true 45.8%; usually said: 40% to 60%" in text
    assert "✗ saved by mpt-bf16-true:compact -8.3%" in text


def test_without_fp32_nothing_is_said_of_it() -> None:
    assert "usually said" not in "\n".join(shown(200, ROWS[1:]))
    assert all(row["claims"] == [] for row in to_json(ROWS[1:]))


def test_savings_are_against_the_first_that_worked() -> None:
    text = "\n".join(shown(200, ROWS[2:]))
    assert "-650.00 MiB" in text
    assert "-100.0%" in text
    assert [row["saved_bytes"] for row in to_json(ROWS[2:])] == [None, 0, -650 * MIB]


def test_where_none_worked_their_errors_are_shown() -> None:
    text = "\n".join(shown(80, ROWS[1:3]))
    assert "failed" in text
    assert "saved" not in text
