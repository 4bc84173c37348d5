"""What each effort costs and brings: the embedded default, fitted three times.

python benchmarks/effort.py
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from table import Row, Section, finish_page

from anyfit import Family
from anyfit.checkpoint import Checkpoint
from anyfit.core.effort import Effort
from anyfit.tasks.language import Reference, measure
from anyfit.zoo import MODEL

MOST_TIMES_LOW = 3.0
BUDGETS = ("2.2 bits", "2.7 bits", "3 bits", "3.5 bits", "4 bits", "4.5 bits", "5.5 bits")


@dataclass(frozen=True)
class Fitted:
    """A family, and the seconds that its process took, waiting included and of the processor."""

    family: Family
    wall: float
    cpu: float


def fitted(output: Path, effort: Effort) -> Fitted:
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "anyfit", "fit", "-o", str(output), "--effort", effort]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Fitted(Family.open(output), time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def time_rows(found: dict[Effort, Fitted]) -> list[Row]:
    low, rows = found[Effort.LOW], []
    for effort, made in found.items():
        refined = sum(point.refined for point in made.family.points)
        ratios = f"{made.wall / low.wall:.2f} / {made.cpu / low.cpu:.2f}"
        cells = (effort, str(len(made.family.space.formats())), str(refined), f"{made.wall:.0f}", f"{made.cpu:.0f}", ratios)
        print("  ".join(cells), flush=True)
        rows.append(Row(cells, holds=max(made.wall / low.wall, made.cpu / low.cpu) <= MOST_TIMES_LOW))
    return rows


def quality_rows(found: dict[Effort, Fitted]) -> list[Row]:
    """KL on the report split at equal budgets. An effort may not lose to the one before by more than its error."""
    reference = Reference.of(Checkpoint.open(MODEL).load(), found[Effort.LOW].family.text()["report"])
    rows = []
    for budget in BUDGETS:
        cells, best, holds = [budget], float("inf"), True
        for made in found.values():
            if made.family.space.bits(made.family.space.smallest()) > float(budget.split()[0]):
                cells.append("none so small")
                continue
            quality = measure(made.family.extract(budget), reference)
            cells.append(f"{quality.kl_mean:.5f} ± {quality.kl_stderr:.5f}")
            holds &= quality.kl_mean <= best + quality.kl_stderr
            best = min(best, quality.kl_mean)
        print("  ".join(cells), flush=True)
        rows.append(Row(tuple(cells), holds=holds))
    return rows


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = {effort: fitted(Path(name, f"{effort}.family"), effort) for effort in Effort}
        sections = [
            Section(
                "Time",
                ("effort", "formats", "refined sizes", "s", "CPU s", "times low, wall / CPU"),
                time_rows(found),
                (f"Whole processes, start of Python included. A row holds with at most {MOST_TIMES_LOW:g} times low's time.",),
            ),
            Section(
                "KL to the original at equal budgets",
                ("budget", *Effort),
                quality_rows(found),
                ("What `export --budget` takes from each family, on the report split.",),
            ),
        ]
    return finish_page("effort", "What more effort costs and brings", "make bench-effort", sections, ())


if __name__ == "__main__":
    sys.exit(main())
