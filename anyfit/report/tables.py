"""The figures of a family as tables for the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table

from anyfit.core.budget import BYTES, describe
from anyfit.core.config import Config
from anyfit.report import sparsity, summary
from anyfit.report.listing import add, headed, listing
from anyfit.structure.levels import worded

if TYPE_CHECKING:
    from anyfit.family import Family, Point
    from anyfit.tasks.base import Quality


def frontier(family: Family, chosen: Point | None = None) -> Table:
    """Every size of the frontier, with the uniform settings between them; `chosen` is marked."""
    others = list(family.space.others)
    table = headed("", "size", "bits", *others, *family.original.report.columns(), "kind", "mostly")
    for row in summary.rows(family):
        if not (row.frontier or row.point.uniform):
            continue
        quality, here = row.quality, chosen is not None and row.point.config == chosen.config
        cells = (
            "▸" if here else "●" if row.frontier else "",
            describe(BYTES, row.point.bytes_),
            f"{row.point.bits:.2f}",
            *(describe(cost, family.space.costs(row.point.config)[cost]) for cost in others),
            *quality.columns().values(),
            summary.kind(row.point),
            mostly(family, row.point.config),
        )
        add(table, cells, style="bold" if here else "" if row.frontier else "dim")
    return table


def sparsity_table(family: Family) -> Table:
    """What one mask everywhere comes to, by what chose the weights; up to where sparsity is free, and the knee."""
    found = sparsity.curves(family)
    return listing(sparsity.rows(found), "weights removed", *(f"{sparsity.named(curve.shares[0.0])} by {curve.score}" for curve in found))


def mostly(family: Family, config: Config) -> str:
    """The two formats that hold the most weights: `Q4_K 61 %, Q3_K 30 %`."""
    shares = list(summary.shares(family.space, config).items())[:2]
    return ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares)


def layers(family: Family, config: Config) -> Table:
    """What each block got, role by role; a matrix outside the blocks has a line of its own."""
    cells: dict[int | None, dict[str, str]] = {}
    for decision in family.space.decisions:
        for weight in decision.unit.weights:
            cells.setdefault(weight.block, {})[weight.role] = worded(config[decision.key])
    blocks = sorted(block for block in cells if block is not None)
    roles = list(dict.fromkeys(role for block in blocks for role in cells[block]))
    table = headed("block", *roles)
    for block in blocks:
        add(table, [str(block), *[cells[block].get(role, "") for role in roles]])
    for role, format_ in cells.get(None, {}).items():
        add(table, [role, format_])
    return table


def refusals(coverage: Iterable[tuple[str, str, str]]) -> Table:
    """What the target's rules took off the menu, and why."""
    counts = Counter((format_, reason) for _, format_, reason in coverage)
    rows = [(format_ or "kept as it is", str(count), reason) for (format_, reason), count in counts.items()]
    return listing(rows, "not possible", "units", "because")


def quality(figures: Quality, original: Quality | None) -> Table:
    """One measurement; without the original there is nothing to diverge from."""
    if original is None:
        rows = [figures.own] if figures.own else []
    else:
        rows = [(figure.name, figure.value) for figure in figures.figures(original)]
        rows += [(f"{own[0]} of the original", own[1])] if (own := original.own) else []
    rows.append(("tokens in segments", f"{figures.num_tokens:,} in {figures.num_segments:,}"))
    return listing(rows, "measure", "value")
