"""How quality falls with sparsity, in a family of masks: curves, where they drop off, and patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from anyfit.structure.masks import Mask, mask_of

if TYPE_CHECKING:
    from anyfit.family import Family
    from anyfit.tasks.language import Quality

WITHIN = 0.01
"""Of the dense network's perplexity, up to which sparsity counts as free: the paper's tolerance."""


@dataclass(frozen=True)
class Curve:
    """Of one saliency: `shares`, {share of the weights removed: quality}, rising from nothing removed, and `patterns`."""

    score: str
    shares: Mapping[float, Quality]
    patterns: Mapping[Mask, Quality]

    @property
    def free(self) -> float:
        """The largest share up to which no perplexity is more than `WITHIN` above the dense network's."""
        return free(list(self.shares), [quality.perplexity for quality in self.shares.values()])

    @property
    def knee(self) -> float:
        """The share from which quality falls off."""
        return knee(list(self.shares), [quality.perplexity for quality in self.shares.values()])


def curves(family: Family) -> list[Curve]:
    """Of every saliency, the best first, from what was measured of one mask everywhere; empty where nothing is masked."""
    found = {str(point.uniform): point.report for point in family.points if point.report}
    masks = {mask: quality for name, quality in found.items() if (mask := mask_of(name))}
    dense = next((point.report for point in family.points if point.config == family.space.largest()), None)
    if not masks or dense is None:
        return []
    made = []
    for score in dict.fromkeys(mask.score for mask in masks):
        own = {mask: quality for mask, quality in masks.items() if mask.score == score}
        shares = {round(1 - mask.density, 4): quality for mask, quality in own.items() if mask.group is None}
        patterns = sorted((mask for mask in own if mask.group is not None), key=lambda mask: (mask.density, -mask.keep))
        made.append(Curve(score, {0.0: dense, **dict(sorted(shares.items()))}, {mask: own[mask] for mask in patterns}))
    return sorted(made, key=lambda curve: sum(quality.kl_mean for quality in curve.shares.values()))


def free(shares: Sequence[float], perplexities: Sequence[float]) -> float:
    """See `Curve.free`; the first is the dense network's."""
    least = shares[0]
    for share, perplexity in zip(shares, perplexities, strict=True):
        if perplexity > (1 + WITHIN) * perplexities[0]:
            break
        least = share
    return least


def knee(shares: Sequence[float], perplexities: Sequence[float]) -> float:
    """The share whose logarithm of the perplexity is furthest below the line between the ends."""
    x, y = np.array(shares), np.log(perplexities)
    chord = y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0])
    return float(x[(chord - y).argmax()])


def to_json(family: Family) -> dict[str, Any]:
    """{saliency: its curve}."""
    return {
        curve.score: {
            "free": curve.free,
            "knee": curve.knee,
            "shares": [{"removed": share, **_figures(quality)} for share, quality in curve.shares.items()],
            "patterns": [{"keep": mask.keep, "group": mask.group, **_figures(quality)} for mask, quality in curve.patterns.items()],
        }
        for curve in curves(family)
    }


def rows(found: Sequence[Curve]) -> list[tuple[str, ...]]:
    """What is removed, and the perplexity by each curve: shares, patterns, then how much is free and the knees."""
    shares = list(dict.fromkeys(share for curve in found for share in curve.shares))
    patterns = list(dict.fromkeys((mask.keep, mask.group) for curve in found for mask in curve.patterns))
    lines = [(f"{share:.0%}", *(_perplexity(curve.shares.get(share)) for curve in found)) for share in sorted(shares)]
    for keep, group in patterns:
        own = [{(mask.keep, mask.group): quality for mask, quality in curve.patterns.items()} for curve in found]
        lines.append((f"keeps {keep} of {group}", *(_perplexity(row.get((keep, group))) for row in own)))
    lines.append((f"free, within {WITHIN:.0%}", *(f"{curve.free:.0%}" for curve in found)))
    return [*lines, ("knee", *(f"{curve.knee:.0%}" for curve in found))]


def _perplexity(quality: Quality | None) -> str:
    return "" if quality is None else f"{quality.perplexity:.2f}"


def _figures(quality: Quality) -> dict[str, float]:
    return {"perplexity": quality.perplexity, "kl": quality.kl_mean}
