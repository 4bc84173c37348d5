"""Targets of the Makefile that are more than one command."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("fails", "status"), [("--minilm", 2), ("structure.py$", 2), ("nothing", 0)])
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_both_networks_are_benchmarked_whatever_the_first_verdict(fails: str, status: int, tmp_path: Path) -> None:
    """With a python that only says what it was asked, and fails where its arguments match."""
    python, said = tmp_path / "bin" / "python", tmp_path / "said"
    python.parent.mkdir()
    python.write_text(f"#!/bin/sh\necho \"$@\" >> '{said}'\n! echo \"$@\" | grep -qe '{fails}'\n")
    python.chmod(0o755)
    for stamp in (".installed", ".dev"):
        (tmp_path / stamp).touch()
    made = subprocess.run(
        ["make", "bench-structure", f"VENV={tmp_path}", "MINILM=minilm", "ASSETS=assets", "PEERS=peers"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == status, made.stderr
    second = "benchmarks/structure.py --minilm minilm --assets assets --environments peers"
    assert said.read_text().splitlines() == ["benchmarks/structure.py", second]
