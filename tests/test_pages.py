"""Pages of benchmarks: a part that is run again takes its own place, and the verdict counts all of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import table
from table import Row, Section, finish_page


def section(title: str, *holds: bool | None) -> Section:
    return Section(title, ("what",), [Row((f"{title} {number}",), own) for number, own in enumerate(holds)], ("A remark.",))


def test_a_part_that_is_run_again_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    path = tmp_path / "page.md"

    def written(sections: list[Section], **more: bool) -> tuple[int, str]:
        return finish_page("page", "A page", "make bench-page", sections, ("Of all.",), **more), path.read_text(encoding="utf-8")

    status, whole = written([section("First", True, None), section("Second", False), section("Third", True)])
    assert status == 1 and whole.endswith("\nverdict: 2 of 3 rows hold\n")
    status, mended = written([section("Second", True, True), section("Fourth", False)], partly=True)
    assert status == 1 and mended.endswith("\n\nverdict: 4 of 5 rows hold\n")
    assert [line for line in mended.splitlines() if line.startswith("## ")] == ["## First", "## Second", "## Third", "## Fourth"]
    first, second, third, fourth = mended.partition("## First")[2].split("## ")
    assert "Run by itself on" in second and "Run by itself on" in fourth and "Run by itself" not in first + third
    assert whole.partition("## Second")[0] == mended.partition("## Second")[0]
    assert written([section("Second", True, True)], partly=True)[1] == mended
    assert written([section("First", True)])[1].count("## ") == 1, "a whole run begins anew"
    assert written([section("First", True)], partly=True)[0] == 0, "what was run now holds"


def test_a_part_of_a_page_that_is_not_there_is_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    assert finish_page("page", "A page", "make bench-page", [section("First", True)], partly=True) == 0
    assert "# A page\n\n`make bench-page`; " in (tmp_path / "page.md").read_text(encoding="utf-8")
