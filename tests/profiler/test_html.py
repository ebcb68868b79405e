"""The HTML page: whole, alone, and safe to open whatever a report holds."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from reports import MIB, transformer

from lightning_mpt.profiler import Category, Duplicate, MemoryReport, PhasePeak, TensorUse, TimelinePoint
from lightning_mpt.profiler.recording import Recording
from lightning_mpt.profiler.show.html import render_html, write_html
from lightning_mpt.profiler.show.page import SCRIPT

VOID = {"meta"}


class Page(HTMLParser):
    """What is in a page: its tags with their attributes, its text, and whether every tag is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += f"{data} "

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def test_the_page_says_what_the_report_says() -> None:
    page = Page(render_html([transformer()], ["mine"]))
    for said in (
        "mine", "cuda:0 · 3 steps recorded", "AdamW", "522.20 MiB", "480.00 MiB", "91.9%", "optimizer step",
        "\N{MULTIPLICATION SIGN}12",
        "8x256x512", "bfloat16 and float32", "Checkpoint the 12 blocks net.h.*", "Two modules could not be told apart.",
        "of it workspaces of libraries", "1 time",
    ):  # fmt: skip
        assert said in page.text, said
    assert page.count("svg") == page.count("article") == 1
    assert page.count("details") == 4  # the blocks, attn and mlp in them, and the root itself


def test_nothing_is_fetched_from_anywhere() -> None:
    source = render_html([transformer(), transformer()], ["a", "b"])
    for tag, attributes in Page(source).tags:
        assert not {"src", "href", "srcset", "action", "data"} & attributes.keys(), tag
        assert tag not in ("link", "iframe", "img", "object", "embed", "base", "form")
    assert not re.search(r"https?:|url\(|@import|//\w", source)
    assert "default-src 'none'" in source


def test_the_one_script_is_the_one_that_the_policy_allows() -> None:
    source = render_html([transformer()], ["a"])
    assert source.count("<script") == 1
    assert f"<script>{SCRIPT}</script>" in source
    assert "</" not in SCRIPT


EVIL = """"'><script>alert(1)</script><img src=x onerror=alert(1)>&\x1b[1m"""


def poisoned() -> MemoryReport:
    """A report with something evil wherever a report has text."""
    report = transformer(2)
    blocks = {path: dict(own) for path, own in report.modules.items()}
    point = TimelinePoint(1_000_000, EVIL, 5 * MIB, {Category.WEIGHTS: 5 * MIB})
    return dataclasses.replace(
        report,
        device=EVIL,
        phases={EVIL: PhasePeak(report.peak_bytes, report.categories)},
        modules={**blocks, EVIL: {Category.ACTIVATIONS: 50 * MIB}},
        tensors=(TensorUse(MIB, Category.ACTIVATIONS, EVIL, (2,), EVIL, EVIL),),
        duplicates=(Duplicate(EVIL, (2,), (EVIL, EVIL), 20 * MIB),),
        timeline=(point, dataclasses.replace(point, time_ns=9_000_000)),
        optimizers=(EVIL,),
        notes=(EVIL,),
    )


def test_what_comes_from_a_report_is_text_and_nothing_else() -> None:
    source = render_html([poisoned(), poisoned()], [EVIL, EVIL])
    page = Page(source)
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert page.text.count("<script>alert(1)</script>") >= 10
    assert "\x1b" not in source
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)


def test_reports_side_by_side_say_what_is_saved() -> None:
    base, half = transformer(), transformer(activations=20 * MIB)
    page = Page(render_html([base, half], ["whole", "half"]))
    assert page.count("article") == page.count("svg") == 2
    assert "Side by side" in page.text
    assert f"{(base.peak_bytes - half.peak_bytes) / base.peak_bytes:.1%}" in page.text
    assert "Side by side" not in Page(render_html([base], ["whole"])).text


def test_charts_of_several_reports_share_one_scale() -> None:
    small = transformer(activations=10 * MIB)

    def roof(source: str) -> float:
        """The highest point of the last chart: the smallest y of its areas."""
        chart = source.split("<svg")[-1]
        return min(float(y) for points in re.findall(r'points="([^"]*)"', chart) for y in re.findall(r",(\S+)", points))

    alone, beside = roof(render_html([small], ["a"])), roof(render_html([transformer(), small], ["b", "a"]))
    assert alone < 40 < 100 < beside


def test_every_moment_has_its_figures_to_point_at() -> None:
    report = transformer()
    titles = re.findall(r'class="at".*?<title>(.*?)</title>', render_html([report], ["a"]))
    assert len(titles) == len(report.timeline)
    assert titles[1].startswith("1.0 ms, backward: 522.20 MiB. activations 480.00 MiB, ")


def test_bars_are_as_long_as_what_they_stand_for() -> None:
    source = render_html([transformer()], ["a"])
    assert f"width:{100 * 480 / 522.2:.3f}"[:-2] in source


@pytest.mark.parametrize("changes", [{}, {"phases": {}, "timeline": ()}, {"peak_bytes": 0}, {"parameters": 0}])
def test_a_report_with_little_in_it_has_a_page(changes: dict, tmp_path: Path) -> None:
    for report in (MemoryReport.from_recording(Recording("cpu", 0)), transformer(**changes)):
        write_html([report], ["a"], tmp_path / "a.html")
        assert "at the peak" in Page((tmp_path / "a.html").read_text()).text
