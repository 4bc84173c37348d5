"""What a table of latencies says of the parts of a pruned network."""

from __future__ import annotations

from collections.abc import Iterable

from anyfit.core.config import HEADS, WIDTH
from anyfit.core.errors import UserError
from anyfit.costs.latency import ATTENTION, FEED_FORWARD, LatencyTable
from anyfit.structure.space import Measured


def measured(table: LatencyTable, dense: str) -> Measured:
    """What a pruned network's parts take by a table. A format that wasn't timed counts as the `dense` one. Raises `UserError` where that
    wasn't timed either."""
    if dense not in table.whole:
        raise UserError(
            f"Latencies were measured in {', '.join(table.whole)}, and this network is stored in {dense}.",
            remedy=f"Measure again with --formats {dense}.",
        )
    kinds = {HEADS: ATTENTION, WIDTH: FEED_FORWARD}

    def timed(format_: str) -> str:
        return format_ if format_ in table.whole else dense

    return Measured(
        lambda structure, kept, format_: table.ms(kinds[structure.axis], kept, timed(format_)),
        lambda format_: table.rest(timed(format_)),
    )


def untimed(table: LatencyTable, formats: Iterable[str], dense: str) -> list[str]:
    """What is said of formats that `measured` counts as another."""
    names = ", ".join(name for name in formats if name not in table.whole)
    return [f"{names}: not timed, and counted as no faster than {dense}"] if names else []
