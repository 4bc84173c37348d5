"""The page, the model card, the picture and the tables of a finished family."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from io import StringIO
from pathlib import Path

import pytest
from made_family import BITS, NUM_BLOCKS, ROLES, made_family
from rich.console import Console

from anyfit.family import Family
from anyfit.report import card, page, plots, summary, tables
from anyfit.report.charts import Axis, place


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return made_family(tmp_path_factory.mktemp("families") / "demo.family")


class Tags(HTMLParser):
    """Every tag with its attributes, and whether they were closed in order."""

    VOID = ("meta", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_whole_and_asks_for_nothing(family: Family) -> None:
    text = page.render(family)
    parsed = Tags(text)
    assert not parsed.open
    assert not [tag for tag, attributes in parsed.tags if {"src", "href", "action", "xlink:href"} & attributes.keys()]
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttpRequest", text)
    assert "default-src 'none'" in text


def test_page_shows_every_measured_size_and_decision(family: Family) -> None:
    text = page.render(family)
    tags = Tags(text).tags
    rows = [attributes for tag, attributes in tags if tag == "tr" and "data-row" in attributes]
    units = {attributes["data-unit"] for tag, attributes in tags if "data-unit" in attributes}
    assert len(rows) == len(family.points)
    assert units == {str(index) for index in range(1 + NUM_BLOCKS * len(ROLES))}
    for point in family.points:
        assert point.report is not None
        assert summary.plus_minus(point.report.kl_mean, point.report.kl_stderr) in text


def test_page_data_names_the_choices_of_each_row(family: Family) -> None:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.render(family), re.DOTALL)
    assert found is not None
    data = json.loads(found[1])
    for row, point in zip(data["rows"], family.points, strict=True):
        chosen = [data["formats"][index] for index in row["choices"]]
        assert chosen == [point.config.format(decision.unit.name) for decision in family.space.decisions]
    assert dict(zip(data["formats"], data["bits"], strict=True)) == pytest.approx(BITS)


def test_names_from_outside_stay_text(tmp_path: Path) -> None:
    name = "</script><script>alert(1)</script>|`x`\n[bold]"
    hostile = made_family(tmp_path / "demo.family", name)
    text = page.render(hostile)
    assert "alert(1)" in text
    assert "<script>alert" not in text
    assert sum(tag == "script" for tag, _ in Tags(text).tags) == 2
    made = card.model_card(hostile, hostile.frontier[0], "demo.gguf")
    assert "\n[bold]" not in made
    assert "base_model" not in made


def test_bytes_depend_on_the_family_alone(family: Family, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[3]); from test_report import write_all; "
        "from anyfit.family import Family; write_all(Family.open(sys.argv[1]), Path(sys.argv[2]))"
    )
    here, there = tmp_path / "here", tmp_path / "there"
    write_all(family, here)
    arguments = [str(family.path), str(there), str(Path(__file__).parent)]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    for name in ("report.html", "README.md", "frontier.png"):
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert (here / "frontier.png").read_bytes().startswith(b"\x89PNG")


def write_all(family: Family, folder: Path) -> None:
    """Everything that the report makes, into a new folder."""
    folder.mkdir()
    page.write(family, folder / "report.html")
    plots.frontier_png(family, folder / "frontier.png")
    (folder / "README.md").write_text(card.model_card(family, family.frontier[-1], "m.gguf"), encoding="utf-8")


def test_card_says_what_was_measured_and_what_was_not(family: Family) -> None:
    measured = family.frontier[2]
    assert measured.report is not None
    text = card.model_card(family, measured, "demo.gguf")
    assert text.startswith("---\n")
    assert 'base_model: "org/tiny-llama"' in text
    assert f"{measured.bytes_:,} bytes" in text
    assert summary.plus_minus(measured.report.kl_mean, measured.report.kl_stderr) in text
    assert "llama-cli -m demo.gguf" in text
    known = {point.config for point in family.points}
    budgets = (f"{size}B" for size in range(family.frontier[0].bytes_ + 1000, family.frontier[-1].bytes_, 7001))
    guessed = next(point for point in map(family.select, budgets) if point.config not in known)
    assert "not measured" in card.model_card(family, guessed, "demo.gguf")
    assert "pipeline(" in card.model_card(family, measured, "demo", dense=True)


def test_tables_hold_the_frontier_and_every_layer(family: Family) -> None:
    point = family.frontier[4]
    console = Console(file=StringIO(), width=140)
    console.print(tables.frontier(family, point))
    console.print(tables.layers(family, point.config))
    console.print(tables.refusals(family.coverage))
    assert isinstance(console.file, StringIO)
    text = console.file.getvalue()
    assert text.count("●") == len(family.frontier) - 1
    assert text.count("▸") == 1
    assert "row length 768 is not a multiple of 512" in text
    assert sum(text.count(name) for name in BITS) >= 1 + NUM_BLOCKS * len(ROLES)


def test_shares_add_up(family: Family) -> None:
    for point in family.points:
        assert math.isclose(sum(summary.shares(family.space, point.config).values()), 1)


def test_rival_is_what_a_budget_of_that_size_gives(family: Family) -> None:
    rows = summary.rows(family)
    for row in rows:
        if row.point.uniform:
            best = min((p for p in family.points if p.bytes_ <= row.point.bytes_), key=lambda p: p.search.kl_mean if p.search else math.inf)
            assert summary.rival(rows, row).point == best


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("all_of_them", [False, True])
def test_lossless_settings_are_shown_like_any_other(tmp_path: Path, family: Family, all_of_them: bool) -> None:
    threshold = math.inf if all_of_them else family.frontier[-3].predicted
    lossless = made_family(tmp_path / "lossless.family", lossless_below=threshold)
    uniform = next(row for row in summary.rows(lossless) if row.point.uniform == "Q8_0")
    best = summary.rival(summary.rows(lossless), uniform)
    assert uniform.quality.kl_mean == 0
    assert summary.saved(best, uniform) == "–"
    write_all(lossless, tmp_path / "made")
    assert not Tags((tmp_path / "made" / "report.html").read_text(encoding="utf-8")).open
    assert tables.frontier(lossless).row_count > 0


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.012345, 0.00041, "0.0123 ± 0.0004"),
        (0.012345, 0.00015, "0.01235 ± 0.00015"),
        (14.5, 0.31, "14.5 ± 0.3"),
        (1234.5, 31.0, "1234 ± 31"),
        (0.25, 0.0, "0.25"),
        (0.25, math.nan, "0.25"),
        (0.000024986407, 2.8e-21, "2.499e-05"),
    ],
)
def test_figures_have_the_digits_that_mean_something(value: float, error: float, text: str) -> None:
    assert summary.plus_minus(value, error) == text


@pytest.mark.parametrize("log", [False, True])
def test_axis_keeps_order_and_bounds(log: bool) -> None:
    axis = Axis.around([0.002, 0.9], 400, 20, log=log)
    placed = [axis.at(value) for value in (0.001, 0.002, 0.05, 0.9, 5.0)]
    assert placed == sorted(placed, reverse=True)
    assert all(20 <= y <= 400 for y in placed)
    assert all(axis.low <= tick <= axis.high for tick in axis.ticks())
    assert len(axis.ticks()) >= 2


def test_labels_do_not_cover_each_other() -> None:
    labels = place([("Q4_K", 100, 50), ("Q4_0", 101, 51), ("IQ4_NL", 99, 52)], [], 600)
    for one in labels:
        for other in labels:
            apart = abs(one.y - other.y) >= 9 or abs(one.x - other.x) >= 25
            assert one is other or apart, (one, other)
