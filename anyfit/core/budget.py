"""Budgets as a person types them: `1.5GB`, `<= 3.2 bits`, `50%`, `20ms`, `2x`, several at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from anyfit.core.errors import BudgetError, UserError

BYTES, BITS, LATENCY, MACS, WEIGHTS = "bytes", "bits", "ms", "macs", "weights"
"""Costs: of the file, per weight, milliseconds as they were measured, multiply-adds a token, weights in the blocks that aren't zero."""
WHOLE = {LATENCY: 1e-6}
"""What costs that aren't whole numbers are counted in, rounded up, so that a budget is a guarantee: nanoseconds."""
_BYTE_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_BIT_UNITS = {"BIT": 1, "BITS": 1, "BPW": 1}
_TIME_UNITS = {"US": 1e-3, "MS": 1, "S": 1e3}
_MAC_UNITS = {f"{power}{unit}": size for power, size in (("", 1), ("K", 10**3), ("M", 10**6), ("G", 10**9)) for unit in ("MAC", "MACS")}
_UNITS = {
    unit: (cost, size)
    for cost, units in ((BYTES, _BYTE_UNITS), (BITS, _BIT_UNITS), (LATENCY, _TIME_UNITS), (MACS, _MAC_UNITS))
    for unit, size in units.items()
}
_PART = re.compile(
    r"(?:(?P<cost>bytes|bits|ms|macs|weights)\s*)?(?:<=|≤|=)?\s*"
    r"(?P<number>[0-9][0-9_]*(?:\.[0-9]+)?|\.[0-9]+)\s*(?P<unit>[A-Za-z%]*)",
    re.IGNORECASE,
)
KNOWN_UNITS = (
    "B, KB, MB, GB, TB (powers of 1000), KiB, MiB, GiB, TiB (powers of 1024), bits (per weight), % (of the original's bytes), "
    "ms, s (a token, where decoding was measured), x (times as fast as the original), MMACs, GMACs (multiply-adds a token), macs <= 50%, "
    "weights <= 50% (that aren't zero)"
)


@dataclass(frozen=True)
class Budget:
    """Upper bounds on costs: {"bytes": 1.5e9, "bits": 3.2}. `text` is what the user wrote. `setting`: the one choice everywhere that was
    asked for by its name; there are no bounds then."""

    limits: tuple[tuple[str, float], ...]
    text: str
    setting: str | None = None

    @classmethod
    def parse(cls, text: str | Iterable[str], *, original: Mapping[str, float] | None = None) -> Budget:
        """Read one or several budgets; `original` are the costs that percentages and speed-ups are taken of.

        >>> dict(Budget.parse("<= 90MB, 3.2 bits").limits)
        {'bits': 3.2, 'bytes': 90000000.0}

        Raises `BudgetError` for text that is no budget, with the units that are known.
        """
        parts = [text] if isinstance(text, str) else list(text)
        joined = ", ".join(parts)
        limits: dict[str, float] = {}
        for part in re.split(r",(?!\d{3}\b)|;|\band\b", joined):
            cost, bound = _limit(part.strip(), joined, original or {})
            limits[cost] = min(bound, limits.get(cost, bound))
        return cls(tuple(sorted(limits.items())), joined)

    def allows(self, costs: Mapping[str, float]) -> bool:
        return all(costs[cost] <= bound for cost, bound in self.limits)

    def __str__(self) -> str:
        return self.setting or " and ".join(f"{describe(cost, bound)}" for cost, bound in self.limits)


def units(cost: str, value: float) -> int:
    """A cost in whole units. It is rounded up, unless it is off a whole number by no more than arithmetic is."""
    found = value / WHOLE.get(cost, 1)
    return round(found) if abs(found - round(found)) < 1e-3 else math.ceil(found)


def allowed(cost: str, bound: float) -> int:
    """The largest cost within a bound, in whole units."""
    whole = WHOLE.get(cost, 1)
    found = math.floor(bound / whole)
    # Exactly those that, times a unit, are within the bound, however the division above was rounded.
    found += (found + 1) * whole <= bound
    return found - (found * whole > bound)


def memory_limit(text: str | None) -> int | None:
    """Bytes, as a budget of them is written; None where nothing was said. Raises `BudgetError` for what can't be read, `UserError` for
    another cost."""
    if text is None:
        return None
    limits = dict(Budget.parse(text).limits)
    if limits.keys() != {BYTES}:
        raise UserError(f"The memory limit {text!r} is not in bytes.", remedy="Write a number and a unit, for example 8GB.")
    return int(limits[BYTES])


def describe(cost: str, value: float) -> str:
    """A cost as a person reads it: `1.50 GB`, `3.20 bits`, `2.35 ms`."""
    if cost == BITS:
        return f"{value:.2f} bits"
    if cost == LATENCY:
        return f"{value:.3g} ms" if value < 1000 else f"{value / 1000:.3g} s"
    unit, last = {BYTES: ("B", "B"), MACS: ("MACs", " MACs"), WEIGHTS: (" weights", " weights")}[cost]
    for power, size in (("G", 10**9), ("M", 10**6), ("K", 10**3)):
        if value >= size:
            return f"{value / size:.2f} {power}{unit}"
    return f"{value:.0f} {last.strip()}"


def typed(cost: str, value: float) -> str:
    """A cost as a budget that allows it, to be typed: milliseconds and bits are rounded up."""
    if cost in (BITS, LATENCY):
        return f"{max(1, math.ceil(value * 1000)) / 1000:.3f} {cost}"
    return f"weights <= {value:.0f}" if cost == WEIGHTS else f"{value:.0f} {'MACs' if cost == MACS else 'B'}"


def _limit(part: str, whole: str, original: Mapping[str, float]) -> tuple[str, float]:
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
        return cost or BYTES, number / 100 * _of_original(cost or BYTES, part, original)
    if unit == "X" and cost in ("", LATENCY):
        return LATENCY, _of_original(LATENCY, part, original) / number
    if not unit and cost:
        return cost, number
    if unit in _UNITS and cost in ("", _UNITS[unit][0]):
        own, size = _UNITS[unit]
        return own, number * size
    given = f"the unit {match['unit']!r}" if unit else "no unit"
    raise BudgetError(f"The budget {part!r} has {given}.", remedy=f"Known units: {KNOWN_UNITS}.")


def _of_original(cost: str, part: str, original: Mapping[str, float]) -> float:
    if cost not in original:
        what = {BYTES: "size", LATENCY: "latency", MACS: "number of multiply-adds", WEIGHTS: "number of weights"}[cost]
        remedy = {BYTES: "Say it in numbers.", WEIGHTS: "Fit with a recipe of masks: anyfit fit --recipe essential-sparsity."}.get(
            cost, "Measure it with anyfit measure, and fit with a recipe that prunes: anyfit fit --recipe ziplm --latency TABLE."
        )
        raise BudgetError(f"The budget {part!r} is relative to the original, whose {what} is not known here.", remedy=remedy)
    return original[cost]
