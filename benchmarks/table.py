"""What every benchmark ends with: a page of tables on the screen and in docs/benchmarks/, and a verdict."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"


@dataclass(frozen=True)
class Row:
    """One line. `holds`: whether the claim of this row is met; None for a row that claims nothing."""

    cells: tuple[str, ...]
    holds: bool | None = None


@dataclass(frozen=True)
class Section:
    """One table with what is to be known before reading it. An empty `title` gets no heading."""

    title: str
    header: Sequence[str]
    rows: Sequence[Row]
    remarks: Sequence[str] = ()

    def lines(self) -> list[str]:
        """As Markdown."""
        heading = [f"## {self.title}", ""] if self.title else []
        table = ["| " + " | ".join([*self.header, "holds"]) + " |", "|" + " --- |" * (len(self.header) + 1)]
        table += ["| " + " | ".join([*row.cells, {True: "yes", False: "**no**", None: ""}[row.holds]]) + " |" for row in self.rows]
        return [*heading, *(f"{remark}\n" for remark in self.remarks), *table, ""]


def finish(name: str, title: str, command: str, header: Sequence[str], rows: Sequence[Row], remarks: Sequence[str]) -> int:
    """A page of one table: see `finish_page`."""
    return finish_page(name, title, command, [Section("", header, rows, remarks)])


def finish_page(name: str, title: str, command: str, sections: Sequence[Section], remarks: Sequence[str] = ()) -> int:
    """Print the tables and one verdict over all, write both to docs/benchmarks/NAME.md; the exit status."""
    lines = [*(f"{remark}\n" for remark in remarks), *(line for section in sections for line in section.lines())]
    claims = [row.holds for section in sections for row in section.rows if row.holds is not None]
    verdict = f"verdict: {sum(claims)} of {len(claims)} rows hold"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "numpy", "gguf"))
    machine = f"Python {platform.python_version()}, {versions}, {torch.get_num_threads()} threads"
    page = [f"# {title}", "", f"`{command}`; {machine}.", "", *lines, verdict, ""]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.md").write_text("\n".join(page), encoding="utf-8")
    print("\n".join([*lines, verdict]))
    return 0 if claims and all(claims) else 1
