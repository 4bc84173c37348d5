"""What every benchmark ends with: a table on the screen and in docs/benchmarks/, and a verdict."""

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


def finish(name: str, title: str, command: str, header: Sequence[str], rows: Sequence[Row], remarks: Sequence[str]) -> int:
    """Print the table and the verdict, write both to docs/benchmarks/NAME.md; the exit status."""
    lines = ["| " + " | ".join([*header, "holds"]) + " |", "|" + " --- |" * (len(header) + 1)]
    lines += ["| " + " | ".join([*row.cells, {True: "yes", False: "**no**", None: ""}[row.holds]]) + " |" for row in rows]
    claims = [row.holds for row in rows if row.holds is not None]
    verdict = f"verdict: {sum(claims)} of {len(claims)} rows hold"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "numpy", "gguf"))
    machine = f"Python {platform.python_version()}, {versions}, {torch.get_num_threads()} threads"
    page = [f"# {title}", "", f"`{command}`; {machine}.", "", *(f"{remark}\n" for remark in remarks), *lines, "", verdict, ""]
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.md").write_text("\n".join(page), encoding="utf-8")
    print("\n".join([*remarks, "", *lines, "", verdict]))
    return 0 if claims and all(claims) else 1
