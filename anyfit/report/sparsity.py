"""How quality falls with sparsity, in a family of masks: curves, where they drop off, and patterns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from anyfit.structure.masks import Mask, mask_of
from anyfit.tasks.base import Quality
from anyfit.tasks.language import Quality as LanguageQuality

if TYPE_CHECKING:
    from anyfit.family import Family

WITHIN = 0.01
"""Of the dense network's perplexity, up to which sparsity counts as free: the paper's tolerance. Where there is none, of the distance."""


@dataclass(frozen=True)
class Curve:
    """Of one saliency: `shares`, {share of the weights removed: quality}, rising from nothing removed, and `patterns`."""

    score: str
    shares: Mapping[float, Quality]
    patterns: Mapping[Mask, Quality]

    @property
    def free(self) -> float:
        """The largest share up to which none has lost more than `WITHIN`."""
        return free(list(self.shares), [height(quality) for quality in self.shares.values()])

    @property
    def knee(self) -> float:
        """The share from which quality falls off."""
        return knee(list(self.shares), [height(quality) for quality in self.shares.values()])


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
    return sorted(made, key=lambda curve: sum(quality.loss for quality in curve.shares.values()))


def height(quality: Quality) -> float:
    """What grows as weights are removed: the logarithm of the perplexity, or the distance from the original."""
    return math.log(figure(quality)) if isinstance(quality, LanguageQuality) else figure(quality)


def figure(quality: Quality) -> float:
    """What curves are drawn of: the perplexity, or the distance from the original."""
    return quality.perplexity if isinstance(quality, LanguageQuality) else quality.loss


def free(shares: Sequence[float], heights: Sequence[float]) -> float:
    """See `Curve.free`; the first is the dense network's."""
    least = shares[0]
    for share, reached in zip(shares, heights, strict=True):
        if reached > heights[0] + math.log1p(WITHIN):
            break
        least = share
    return least


def knee(shares: Sequence[float], heights: Sequence[float]) -> float:
    """The share whose height is furthest below the line between the ends."""
    x, y = np.array(shares), np.array(heights)
    chord = y[0] + (y[-1] - y[0]) * (x - x[0]) / (x[-1] - x[0])
    return float(x[(chord - y).argmax()])


def named(quality: Quality) -> str:
    """What the figure is called."""
    return "perplexity" if isinstance(quality, LanguageQuality) else quality.distance


def shown(quality: Quality | None) -> str:
    """The figure, written."""
    if quality is None:
        return ""
    return f"{figure(quality):{'.2f' if isinstance(quality, LanguageQuality) else '.4f'}}"


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
    """What is removed, and the figure by each curve: shares, patterns, then how much is free and the knees."""
    shares = list(dict.fromkeys(share for curve in found for share in curve.shares))
    patterns = list(dict.fromkeys((mask.keep, mask.group) for curve in found for mask in curve.patterns))
    lines = [(f"{share:.0%}", *(shown(curve.shares.get(share)) for curve in found)) for share in sorted(shares)]
    for keep, group in patterns:
        own = [{(mask.keep, mask.group): quality for mask, quality in curve.patterns.items()} for curve in found]
        lines.append((f"keeps {keep} of {group}", *(shown(row.get((keep, group))) for row in own)))
    lines.append((f"free, within {WITHIN:.0%}", *(f"{curve.free:.0%}" for curve in found)))
    return [*lines, ("knee", *(f"{curve.knee:.0%}" for curve in found))]


def _figures(quality: Quality) -> dict[str, float]:
    own = {"perplexity": quality.perplexity} if isinstance(quality, LanguageQuality) else {}
    return {**own, "loss": quality.loss}
