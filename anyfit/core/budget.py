"""Budgets as a person types them: `1.5GB`, `<= 3.2 bits`, `50%`, several at once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from anyfit.core.errors import BudgetError

BYTES, BITS = "bytes", "bits"
_BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_BIT_UNITS = {"BIT", "BITS", "BPW"}
_PART = re.compile(
    r"(?:(?P<cost>bytes|bits)\s*)?(?:<=|≤|=)?\s*(?P<number>[0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)\s*(?P<unit>[A-Za-z%/]*)", re.IGNORECASE
)
KNOWN_UNITS = "B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024), bits (per weight), % (of the original's bytes)"


@dataclass(frozen=True)
class Budget:
    """Upper bounds on costs: {"bytes": 1.5e9, "bits": 3.2}. `text` is what the user wrote."""

    limits: tuple[tuple[str, float], ...]
    text: str

    @classmethod
    def parse(cls, text: str | Iterable[str], *, original_bytes: int | None = None) -> Budget:
        """Read one or several budgets; `original_bytes` is what a percentage is taken of.

        >>> dict(Budget.parse("<= 90MB, 3.2 bits").limits)
        {'bits': 3.2, 'bytes': 90000000.0}

        Raises `BudgetError` for text that is no budget, with the units that are known.
        """
        parts = [text] if isinstance(text, str) else list(text)
        joined = ", ".join(parts)
        limits: dict[str, float] = {}
        for part in re.split(r",(?!\d{3}\b)|;|\band\b", joined):
            cost, bound = _limit(part.strip(), joined, original_bytes)
            limits[cost] = min(bound, limits.get(cost, bound))
        return cls(tuple(sorted(limits.items())), joined)

    def allows(self, costs: Mapping[str, float]) -> bool:
        return all(costs[cost] <= bound for cost, bound in self.limits)

    def __str__(self) -> str:
        return " and ".join(f"{describe(cost, bound)}" for cost, bound in self.limits)


def describe(cost: str, value: float) -> str:
    """A cost as a person reads it: `1.50 GB`, `3.20 bits`."""
    if cost == BITS:
        return f"{value:.2f} bits"
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f} B"


def _limit(part: str, whole: str, original_bytes: int | None) -> tuple[str, float]:
    match = _PART.fullmatch(part.replace(",", ""))
    if not match:
        raise BudgetError(
            f"The budget {whole!r} can't be read at {part!r}.",
            remedy=f"Write a number and a unit, for example 1.5GB. Known units: {KNOWN_UNITS}.",
        )
    number, unit = float(match["number"].replace("_", "")), match["unit"].upper()
    if number <= 0:
        raise BudgetError(f"The budget {part!r} is not above zero.", remedy="Write a positive number and a unit, for example 1.5GB.")
    cost = (match["cost"] or "").lower()
    if unit == "%" and cost != BITS:
        if original_bytes is None:
            raise BudgetError(f"The budget {part!r} is a share of the original, whose size is not known here.", remedy="Give it in bytes.")
        return BYTES, number / 100 * original_bytes
    if (unit in _BIT_UNITS and cost != BYTES) or (not unit and cost == BITS):
        return BITS, number
    if (unit in _BYTE_UNITS and cost != BITS) or (not unit and cost == BYTES):
        return BYTES, number * _BYTE_UNITS.get(unit, 1)
    if unit.startswith(("MS", "S/")):
        problem = f"The budget {part!r} is a latency, and families of this version are chosen by size."
        raise BudgetError(problem, remedy=f"Known units: {KNOWN_UNITS}.")
    given = f"the unit {match['unit']!r}" if unit else "no unit"
    raise BudgetError(f"The budget {part!r} has {given}.", remedy=f"Known units: {KNOWN_UNITS}.")
