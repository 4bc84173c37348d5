"""What every benchmark ends with: a page of tables on the screen and in docs/benchmarks/, and a verdict."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from anyfit.costs.latency import Device

HOLDS = {True: "yes", False: "**no**", None: ""}
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
        table += ["| " + " | ".join([*row.cells, HOLDS[row.holds]]) + " |" for row in self.rows]
        return [*heading, *(f"{remark}\n" for remark in self.remarks), *table, ""]


def finish(name: str, title: str, command: str, header: Sequence[str], rows: Sequence[Row], remarks: Sequence[str]) -> int:
    """A page of one table: see `finish_page`."""
    return finish_page(name, title, command, [Section("", header, rows, remarks)])


def finish_page(
    name: str, title: str, command: str, sections: Sequence[Section], remarks: Sequence[str] = (), *, partly: bool = False
) -> int:
    """Print the tables and a verdict, write the page docs/benchmarks/NAME.md; the exit status, by what was run now.

    `partly`: the page keeps its other sections; those that were run now take the place of the ones with their titles, and each says where
    and when that was.
    """
    path, where = FOLDER / f"{name}.md", f"Run by itself on {processor()}, {date.today():%Y-%m-%d}.\n"
    made = {section.title: section.lines() for section in sections}
    if partly:
        for heading, lines in made.items():
            lines.insert(2 if heading else 0, where)
    body = ["\n".join(lines) for lines in made.values()]
    print("\n".join([*(f"{remark}\n" for remark in remarks), *body, _verdict("\n".join(body))]))
    before = path.read_text(encoding="utf-8") if partly and path.exists() else ""
    FOLDER.mkdir(parents=True, exist_ok=True)
    path.write_text(_spliced(before, made) if before else _page(title, command, remarks, body), encoding="utf-8")
    claims = [row.holds for section in sections for row in section.rows if row.holds is not None]
    return 0 if claims and all(claims) else 1


def _page(title: str, command: str, remarks: Sequence[str], body: Sequence[str]) -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "numpy", "gguf"))
    machine = f"{processor()}, Python {platform.python_version()}, {versions}, {torch.get_num_threads()} threads"
    head = [f"# {title}", "", f"`{command}`; {machine}.", "", *(f"{remark}\n" for remark in remarks)]
    return "\n".join([*head, *body, _verdict("\n".join(body)), ""])


def _spliced(page: str, made: dict[str, list[str]]) -> str:
    """A page with the sections that were made in place of those of their titles, or behind all."""
    head, *kept = re.split(r"(?m)^(?=## )", page[: page.rindex("verdict: ")])
    found = {text.partition("\n")[0].removeprefix("## "): text for text in kept} | {
        title: "\n".join([*lines, ""]) for title, lines in made.items()
    }
    body = "".join(found.values())
    return f"{head}{body}{_verdict(body)}\n"


def _verdict(body: str) -> str:
    holding, failing = (len(re.findall(rf"(?m)\| {re.escape(said)} \|$", body)) for said in (HOLDS[True], HOLDS[False]))
    return f"verdict: {holding} of {holding + failing} rows hold"


def processor() -> str:
    """The processor's name."""
    return Device.here("", 1).processor.partition(",")[0]
