"""The frontier as a picture file, for a README or a slide."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anyfit.report import summary
from anyfit.report.charts import floored

if TYPE_CHECKING:
    from anyfit.family import Family

ACCENT, AMBER, INK, LINE = "#0f766e", "#c2610c", "#626d7a", "#e3e1da"


def frontier_png(family: Family, path: Path) -> None:
    """Distance to the original against size, with standard errors; the bytes depend on the family alone."""
    from matplotlib.figure import Figure

    rows = summary.rows(family)
    lift = floored(row.quality.loss for row in rows)
    figure = Figure(figsize=(9, 4.6), dpi=160, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    best, uniform = [r for r in rows if r.frontier], [r for r in rows if r.point.uniform]
    for chosen, style, color, label in ((best, "o-", ACCENT, "anyfit's frontier"), (uniform, "D", AMBER, "one format everywhere")):
        size, loss = [r.point.bytes_ / 1e6 for r in chosen], [lift(r.quality.loss) for r in chosen]
        error = [r.quality.loss_stderr for r in chosen]
        axes.errorbar(size, loss, error, fmt=style, color=color, ms=4.5, lw=1.6, elinewidth=1, capsize=2, label=label)
    for row in uniform:
        at = (row.point.bytes_ / 1e6, lift(row.quality.loss))
        axes.annotate(str(row.point.uniform), at, xytext=(6, 4), textcoords="offset points", color=AMBER, fontsize=8)
    axes.set(yscale="log", xlabel="size of the file, MB", ylabel=family.original.report.about)
    axes.set_title(f"{family.original.name}: {len(best)} sizes from one run, for {family.target}", loc="left", color=INK, fontsize=11)
    axes.grid(color=LINE, lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
