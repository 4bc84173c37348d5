"""What a table of latencies says of the parts of a pruned network."""

from __future__ import annotations

from collections.abc import Sequence

from anyfit.core.config import HEADS, WIDTH
from anyfit.core.errors import UserError
from anyfit.costs.latency import ATTENTION, FEED_FORWARD, LatencyTable
from anyfit.structure.levels import Structure
from anyfit.structure.space import Measured


def measured(table: LatencyTable, formats: Sequence[str]) -> Measured:
    """What a pruned network's parts count for by a table. `formats`: those that may be chosen, the dense one first.

    Raises `UserError` where one wasn't timed: fewer bits may take longer, and budgets in milliseconds are kept.
    """
    if untimed := [name for name in formats if name not in table.whole]:
        known = list(table.whole)
        command = f"anyfit measure MODEL --target {table.target} --formats {','.join(dict.fromkeys([*known, *formats]))}"
        offered = "" if formats[0] in untimed else f" Or offer only what was: --formats {','.join(n for n in formats if n in known)}."
        raise UserError(
            f"Latencies were measured in {', '.join(known)}, and not in {', '.join(untimed)}, which may take longer.",
            remedy=f"Measure again, as before but with these: {command}.{offered}",
        )

    def of(structure: Structure, kept: int, format_: str) -> float:
        # Whether blocks after it are left out whole, which would make another the last one, no single decision knows: that errs slow.
        kind = {HEADS: ATTENTION, WIDTH: FEED_FORWARD}[structure.axis]
        at_end = kind == FEED_FORWARD and structure.reader.block == table.shape.blocks - 1
        return (table.last if at_end else 1.0) * table.at_most(kind, kept, format_)

    return Measured(of, table.rest)
