"""The figures of a family as plain data: what the page, the card, the tables and `--json` all show."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anyfit.core.budget import BITS, BYTES, describe, typed
from anyfit.core.config import HEADS, Config
from anyfit.core.space import Space
from anyfit.report import sparsity
from anyfit.structure.levels import kept_of, worded
from anyfit.tasks.base import plus_minus

if TYPE_CHECKING:
    from anyfit.family import Family, Point
    from anyfit.tasks.base import Quality


@dataclass(frozen=True)
class Row:
    """One measured config, with the figures of the split that the whole table uses. `size`: its leading cost, see `Family.size`."""

    point: Point
    quality: Quality
    frontier: bool
    size: float


def split(family: Family) -> str:
    """The split whose figures are shown: `report`, unless a frontier config was only measured on `search`."""
    return "report" if all(point.report for point in family.frontier) else "search"


def rows(family: Family) -> list[Row]:
    """Every config that was measured on the shown split, smallest first."""
    frontier, shown = {point.config for point in family.frontier}, split(family)
    found = [(point, getattr(point, shown)) for point in family.points]
    measured = [Row(point, quality, point.config in frontier, family.size(point)) for point, quality in found if quality]
    return sorted(measured, key=lambda row: (row.size, not row.frontier, row.point.config.digest))


def rival(all_rows: list[Row], uniform: Row) -> Row:
    """The config of the frontier that a budget of a uniform setting's size gives, which may be that very setting."""
    return [row for row in all_rows if row.frontier and row.size <= uniform.size][-1]


def saved(best: Row, uniform: Row) -> str:
    """The share of a uniform setting's distance to the original that the frontier saves; a lossless one leaves nothing to save."""
    distance = uniform.quality.loss
    return f"{100 - 100 * best.quality.loss / distance:.0f} %" if distance > 0 else "–"


def shares(space: Space, config: Config) -> dict[str, float]:
    """The share of the decided weights that each format holds, largest first."""
    counts: Counter[str] = Counter()
    for decision in space.decisions:
        counts[worded(config[decision.key])] += decision.unit.num_weights
    total = sum(counts.values())
    return {name: count / total for name, count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))}


def removed(space: Space, config: Config) -> dict[str, list[int]]:
    """Blocks of which a half was removed, by the half; and those of which both were, so that they do nothing."""
    found: dict[str, list[int]] = {"attention": [], "feed-forward": []}
    for decision in space.decisions:
        if kept_of(config[decision.key]) == 0:
            block = decision.unit.weights[0].block
            assert block is not None
            found["attention" if decision.axis == HEADS else "feed-forward"].append(block)
    return {**found, "block": sorted(set(found["attention"]) & set(found["feed-forward"]))}


def removed_in_words(space: Space, config: Config) -> str:
    """In one line; empty where nothing was removed as a whole."""
    found = removed(space, config)
    halves = {half: [str(b) for b in blocks if half == "block" or b not in found["block"]] for half, blocks in found.items()}
    parts = [
        f"{'attention' if half == 'attention' else half} of {', '.join(own)}" for half, own in halves.items() if own and half != "block"
    ]
    parts += [f"all of {', '.join(halves['block'])}"] if halves["block"] else []
    return f"Removed from blocks: {'; '.join(parts)}." if parts else ""


def refusals(family: Family) -> list[tuple[str, str, list[str]]]:
    """(format, reason, units) of everything that the target's rules took off the menu, joined by reason."""
    groups: dict[tuple[str, str], list[str]] = {}
    for unit, format_, reason in family.coverage:
        groups.setdefault((format_, reason), []).append(unit)
    return [(format_, reason, units) for (format_, reason), units in groups.items()]


def described(family: Family, point: Point) -> str:
    """A config's size and quality in one line; says whether the quality was measured."""
    others = {name: value for name, value in family.space.costs(point.config).items() if name not in (BYTES, BITS)}
    costs = f"{point.bytes_:,} bytes, {point.bits:.2f} bits per weight, " + "".join(f"{describe(*cost)}, " for cost in others.items())
    if point.report is None:
        distance = family.original.report.distance
        return costs + f"expected {distance} {family.expected(point.predicted):.3g} (this very mix was not measured)"
    quality = point.report
    own, refined = quality.own, ", refined" if point.refined else ""
    return (
        costs
        + f"measured {quality.distance} {plus_minus(quality.loss, quality.loss_stderr)}{f', {own[0]} {own[1]}' if own else ''}{refined}"
    )


def kind(point: Point) -> str:
    """What is special about a config: one format everywhere, matrices of its own."""
    return ", ".join(filter(None, (point.uniform, "refined" if point.refined else "")))


def point_json(family: Family, point: Point) -> dict[str, Any]:
    """One config: what it costs and what was measured."""
    return {
        "config": point.config.digest,
        **family.space.costs(point.config),
        "predicted_kl": point.predicted,
        "uniform": point.uniform,
        "refined": point.refined,
        "search": point.search and point.search.to_json(),
        "report": point.report and point.report.to_json(),
    }


def family_json(family: Family) -> dict[str, Any]:
    """The whole family: what went in, and every size that can be taken out."""
    original = family.original
    return {
        "family": str(family.path),
        "digest": family.digest,
        "target": family.target,
        "original": {
            "name": original.name,
            "bytes": original.bytes_,
            "parameters": original.num_parameters,
            "dtype": original.dtype,
            "report": original.report.to_json(),
        },
        "formats": family.space.formats(),
        "frontier": [point_json(family, point) for point in family.frontier],
        "uniform": [point_json(family, point) for point in family.points if point.uniform],
        "coverage": [{"unit": unit, "format": format_, "reason": reason} for unit, format_, reason in family.coverage],
        "notes": list(family.notes),
        **({"sparsity": sparsity.to_json(family)} if family.masked else {}),
    }


def budget_of(family: Family, point: Point) -> str:
    """What to ask for to get a config of the frontier, as a person types it."""
    scale = family.space.scale
    return f"{point.bytes_}B" if scale == BYTES else f"'{typed(scale, family.size(point))}'"


def flat(data: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, value), in the order of the names."""
    found = []
    for key, value in sorted(data.items()):
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{key}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            found.append((f"{prefix}{key}", text))
    return found
