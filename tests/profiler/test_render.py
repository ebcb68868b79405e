"""What the tables say, and that they fit."""

import dataclasses
import io
from pathlib import Path

import pytest
from reports import MIB, transformer
from rich.console import Console

from lightning_mpt.profiler import MemoryReport, PhasePeak, TensorUse
from lightning_mpt.profiler.category import Category
from lightning_mpt.profiler.recording import Recording
from lightning_mpt.profiler.show.render import print_comparison, print_report, report_text
from lightning_mpt.profiler.show.tables import portions
from lightning_mpt.profiler.show.words import count_of, format_bytes, format_shape, format_share, printable

from .test_report import training_step


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536 << 20, "1.50 GiB"),
        (5 << 50, "5120.00 TiB"),
        (-2048, "-2.00 KiB"),
    ],
)
def test_format_bytes(size: int, text: str) -> None:
    assert format_bytes(size) == text


def test_words() -> None:
    assert [format_share(1, 3), format_share(1, 0)] == ["33.3%", ""]
    assert [format_shape((2, 3)), format_shape(()), format_shape(None)] == ["2x3", "scalar", ""]
    assert [count_of(1, "step"), count_of(2, "step")] == ["1 step", "2 steps"]
    assert printable("a\x1b[31m\nb\ud800") == "a?[31m?b?"


def test_when_memory_ran_out_the_advice_is_how_to_make_room_also_in_a_saved_report(tmp_path: Path) -> None:
    report = dataclasses.replace(transformer(), out_of_memory=True, failed_request_bytes=300 * MIB)
    report.save(tmp_path / "report.json")
    out = io.StringIO()
    print_report(MemoryReport.load(tmp_path / "report.json"), Console(file=out, width=100))
    text = " ".join(out.getvalue().split())
    assert "300.00 MiB more was asked for" in text
    assert "makes room for the 300.00 MiB that failed" in text


def printed(report: MemoryReport, width: int, *, full: bool = False) -> list[str]:
    out = io.StringIO()
    print_report(report, Console(file=out, width=width, color_system=None), full=full)
    return out.getvalue().splitlines()


def compared(width: int, *peaks: int) -> list[str]:
    """Reports beside one of 6000 bytes."""
    out = io.StringIO()
    base, *others = [MemoryReport.from_recording(training_step(own_peak=peak)) for peak in (6000, *peaks)]
    names = ["32-true", "a-precision-with-a-rather-long-name"]
    print_comparison(base.compare(*others, names=names), Console(file=out, width=width, color_system=None))
    return out.getvalue().splitlines()


@pytest.mark.parametrize("width", [60, 80, 200])
def test_the_table_fits_and_says_what_matters(width: int) -> None:
    lines = printed(MemoryReport.from_recording(training_step()), width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    for said in ("weights", "4.00", "activations", "2.00 KiB", "34.1%", "5.86 KiB", "100.0%", "phase peaks"):
        assert said in text
    assert "on cuda:0, 1 step" in text
    assert "reserved" in text


def test_four_phases_in_sixty_columns_are_in_one_unit_and_break_no_name() -> None:
    report = transformer()
    report = dataclasses.replace(report, phases={**report.phases, "clip": next(iter(report.phases.values()))})
    lines = printed(report, 60)
    names = {str(category) for category in Category}
    start = next(index for index, line in enumerate(lines) if line.startswith("peaks, MiB"))
    rows = [line.split() for line in lines[start + 2 :]]
    rows = rows[: next(index for index, row in enumerate(rows) if row[:1] == ["peak"])]
    assert {row[0] for row in rows if row} <= names
    assert any(row[-1] == f"{report.phases['forward'].categories[Category.WEIGHTS] / MIB:.2f}" for row in rows if row)


@pytest.mark.parametrize(("width", "tables"), [(30, 4), (40, 2), (44, 2), (50, 2), (60, 1), (70, 1), (71, 1)])
def test_phases_that_do_not_fit_beside_each_other_are_shown_in_turn(width: int, tables: int) -> None:
    report = transformer()
    phases = {**report.phases, "clip": next(iter(report.phases.values()))}
    sizes = {category: 1000 * MIB + 10_000 * number for number, category in enumerate(Category)}
    phases = {name: PhasePeak(sum(sizes.values()), sizes) for name in phases}
    lines = printed(dataclasses.replace(report, phases=phases), width)
    assert max(map(len, lines)) <= width
    starts = [i for i, line in enumerate(lines) if line.startswith(("peaks, GiB", "phase peaks"))]
    assert len(starts) == tables
    for category, size in (*sizes.items(), ("peak", sum(sizes.values()))):
        rows = [line.split() for line in lines[starts[0] : starts[-1] + 17] if line.startswith(f"{category} ")]
        figures = [cell for row in rows for cell in row[1:] if cell not in ("GiB", "MiB")]
        expected = f"{size / (1 << 30):.2f}" if width < 71 else format_bytes(size).split()[0]
        assert figures == [expected] * 4, category


def test_things_are_split_as_evenly_as_can_be() -> None:
    assert portions("abcde", 4) == ["abc", "de"]
    assert portions("abcde", 0) == ["a", "b", "c", "d", "e"]
    assert portions("abc", 3) == ["abc"]
    assert portions("", 3) == []


@pytest.mark.parametrize("width", [60, 100, 200])
@pytest.mark.parametrize("full", [False, True])
def test_the_whole_report_fits_and_loses_no_word(width: int, full: bool) -> None:
    lines = printed(transformer(), width, full=full)
    assert max(map(len, lines)) <= width
    text = " ".join(" ".join(lines).split())
    assert "…" not in text
    for said in ("net.h.* x12", "attn", "mlp", "480.00 MiB", "note: Two modules could not be told apart.", "1. "):
        assert said in text, said
    for said in ("20.00 MiB", "8x256x512", "bfloat16", "library workspaces", "net.h.0.attn", "4. "):
        assert (said in text) == full, said
    assert ("in the smaller copies" in text) != full


def test_short_reports_give_three_lines_of_advice_and_full_ones_five() -> None:
    numbers = [[f"{i}." for i in range(1, 9) if any(line.startswith(f"{i}. ") for line in lines)] for lines in (
        printed(transformer(), 100), printed(transformer(), 100, full=True))]  # fmt: skip
    assert numbers == [["1.", "2.", "3."], ["1.", "2.", "3.", "4.", "5."]]


def test_modules_show_what_they_hold_in_columns() -> None:
    text = "\n".join(printed(transformer(), 200))
    (line,) = [line for line in text.splitlines() if line.startswith("net.h.*")]
    assert line.split() == ["net.h.*", "x12", "480.00", "MiB", "12.00", "MiB", "24.00", "MiB", "516.00", "MiB"]


def test_what_the_root_module_itself_holds_has_a_row() -> None:
    report = dataclasses.replace(transformer(), modules={"": {Category.ACTIVATIONS: 400 * MIB}})
    assert ["the", "root", "itself", "400.00", "MiB", "400.00", "MiB"] in [line.split() for line in printed(report, 80)]


@pytest.mark.parametrize(("width", "columns"), [(100, 3), (200, 5)])
def test_names_of_modules_are_broken_only_where_fewer_columns_do_not_help(width: int, columns: int) -> None:
    path = "vision_model.patch_embeddings.projection"
    report = dataclasses.replace(transformer(), modules={path: dict.fromkeys(Category, 100 * MIB)})
    (line,) = [line for line in printed(report, width) if line.startswith(path)]
    assert line.count("MiB") == columns


@pytest.mark.parametrize("width", [60, 200])
@pytest.mark.parametrize("full", [False, True])
def test_names_are_shown_as_they_are_and_command_no_terminal(width: int, full: bool) -> None:
    name = "[red]a[/red]\x1b[2J" + ".deep" * 40
    report = transformer(
        device="cuda:\x1b]0;x\x07",
        modules={name: {Category.ACTIVATIONS: 400 * MIB}},
        tensors=(TensorUse(MIB, Category.ACTIVATIONS, name, (1,), "[b]", "\x1b[1m"),),
        notes=("\x1b[5m[blink]",),
    )
    lines = printed(report, width, full=full)
    assert max(map(len, lines)) <= width
    text = "".join("".join(lines).split())
    assert "\x1b" not in text
    assert "[red]a" in text
    assert "[blink]" in text


@pytest.mark.parametrize("width", [60, 200])
def test_reports_side_by_side(width: int) -> None:
    lines = compared(width, 4608)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "32-true" in text
    assert "23.2%" in text  # 1392 of 6000 bytes saved


def test_what_is_saved_adds_up() -> None:
    (unnamed,) = [line for line in compared(80, 4608) if line.startswith("unattributed")]
    assert unnamed.split()[-1] == "23.2%", "all of it is in what has no name"
    assert "-33.3%" in "\n".join(compared(80, 8000))


@pytest.mark.parametrize("width", [60, 120])
def test_more_reports_than_fit_are_shown_in_turn(width: int) -> None:
    lines = compared(width, 5000, 4000, 3000, 2000, 1000)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for saved in ("16.7%", "33.3%", "50.0%", "66.7%", "83.3%"):
        assert saved in text
    tables = sum(line.startswith("category") for line in lines)
    assert tables == (5 if width == 60 else 2)


def test_a_report_compared_with_none_is_shown() -> None:
    assert any(line.startswith("peak") for line in compared(60))


def test_an_empty_report_can_be_shown() -> None:
    empty = MemoryReport.from_recording(Recording("cpu", 0))
    for full in (False, True):
        assert "peak" in report_text(empty, full=full)


def test_printing_goes_to_standard_output(capsys: pytest.CaptureFixture) -> None:
    report = dataclasses.replace(transformer(), steps=1)
    report.print()
    assert "1 step recorded" in capsys.readouterr().out
    report.print(full=True)
    assert "largest" in capsys.readouterr().out
