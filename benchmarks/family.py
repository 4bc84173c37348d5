"""The main job: the same family twice in two processes, then many budgets out of it.

python benchmarks/family.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from table import Row, finish

from anyfit import Family
from anyfit.core.budget import describe

SLOWEST_EXPORT, SLOWEST_FIT, FEWEST_FORMATS = 2.0, 120.0, 8
NUM_BUDGETS = 12


def fitted(output: Path) -> tuple[Family, float]:
    """The embedded default's family, made by the command line in a process of its own; and its seconds."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-m", "anyfit", "fit", "-o", str(output)], check=True, stdout=subprocess.DEVNULL)
    return Family.open(output), time.perf_counter() - began


def fit_row(family: Family, seconds: float) -> Row:
    formats = len(family.space.formats())
    cells = (f"fit, {formats} formats", f"{family.original.num_parameters / 1e6:.1f}M parameters", "", "", "", f"{seconds:.0f}", "")
    return Row(cells, holds=formats >= FEWEST_FORMATS)


def _median_row(what: str, seconds: Sequence[float], slowest: float) -> Row:
    median = statistics.median(seconds)
    return Row((f"median {what}", f"of {len(seconds)}", "", "", "", f"{median:.2f}", ""), holds=median < slowest)


def export_row(family: Family, other: Family, size: int, folder: Path) -> tuple[Row, float]:
    """One budget: taken from both families, without and with the checks of the written file; and the seconds with them."""
    name = f"{size}.gguf"
    began = time.perf_counter()
    family.export(f"{size} B", folder / name, check=False)
    unchecked = time.perf_counter() - began
    export = family.export(f"{size} B", folder / name, force=True)
    other.export(f"{size} B", folder / f"other-{name}", check=False)
    written = (folder / name).stat().st_size
    same = (folder / name).read_bytes() == (folder / f"other-{name}").read_bytes()
    exact = written == export.bytes_ == family.space.bytes_(export.point.config)
    passed = all(check.passed for check in export.checks)
    cells = (
        f"export within {size} B", f"{written} B ({describe('bytes', written)})", "exact" if exact else "OTHER",
        "equal" if same else "DIFFER", f"{unchecked:.2f}", f"{export.seconds:.2f}", f"{len(export.checks)} passed" if passed else "FAILED",
    )  # fmt: skip
    print("  ".join(cells), flush=True)
    return Row(cells, holds=written <= size and exact and same and passed), export.seconds


def main() -> int:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (family, seconds), (other, again) = fitted(folder / "a.family"), fitted(folder / "b.family")
        rows = [fit_row(family, seconds), fit_row(other, again)]
        equal = family.digest == other.digest
        rows.append(Row(("family hash, two processes", family.digest[:16], "", "equal" if equal else "DIFFER", "", "", ""), holds=equal))
        smallest, largest = family.space.bytes_(family.space.smallest()), family.space.bytes_(family.space.largest())
        family.export("90%", folder / "warm-up.gguf")
        exports = [export_row(family, other, int(size), folder) for size in np.geomspace(smallest, largest, NUM_BUDGETS)]
        rows += [row for row, _ in exports]
        rows += [_median_row("fit", (seconds, again), SLOWEST_FIT), _median_row("export", [s for _, s in exports], SLOWEST_EXPORT)]
    remarks = (
        f"The embedded default; a fit's time includes the start of Python. A fit holds with at least {FEWEST_FORMATS} formats.",
        "An export holds where the file is within the budget, as large as predicted, equal in both processes, and passes every check.",
        f"The medians hold below {SLOWEST_FIT:.0f} s for a fit and {SLOWEST_EXPORT:.0f} s for an export with its checks.",
    )
    header = ("what", "result", "size as predicted", "second process", "s, no checks", "s", "checks")
    return finish("family", "The main job: one fit, any budget", "make bench-family", header, rows, remarks)


if __name__ == "__main__":
    sys.exit(main())
