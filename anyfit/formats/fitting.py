"""The search for scales, shared by all grid formats.

Every fit minimises, for each row by itself, the sum over the columns of importance * (weight - value)², where
the values are what plain rounding gives on the grid *as it will be stored*: halves are rounded to halves and
sub-scales to their integers before a code is chosen. The error jumps wherever a weight moves to another code,
so there is no formula for the best scale. Candidates are tried: a few that clip the extremes more or less,
each improved by the weighted least-squares scale of the codes that it gives, then neighbours of the best one.

Inside, tensors are (group, groups, rows): columns of one group come first. Sums over a group are then sums of
whole rows of memory, added pairwise in a fixed order, so that a row's result is the same to the bit whatever
other rows it is fitted with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

HALF_MAX = 65504.0
HALF_TINY = 2.0**-24
CHUNK = 2**17
"""Weights fitted at a time: a temporary of this size stays in the processor's cache."""

Snap = Callable[[Tensor], Tensor]
"""Numbers (changed in place) to the nearest levels."""


@dataclass(frozen=True)
class Columns:
    """One span: `values` (group, groups, rows) and `weights` of their squared errors (group, groups, 1)."""

    values: Tensor
    weights: Tensor

    def error(self, snap: Snap, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """Weighted squared error of rounding on the grid `scale * level - offset`, (groups, rows)."""
        rounded = self.levels(snap, scale, offset).mul_(scale)
        if offset is not None:
            rounded -= offset
        return fold(rounded.sub_(self.values).square_().mul_(self.weights))

    def levels(self, snap: Snap, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """The levels that the values round to, (group, groups, rows)."""
        target = self.values * inverse(scale) if offset is None else (self.values + offset).mul_(inverse(scale))
        return snap(target)


class Best:
    """For each group, or each row, the candidate of least error so far, and what it was made of."""

    def __init__(self, error: Tensor, *parts: Tensor) -> None:
        self.error, self.parts = error, parts

    def offer(self, error: Tensor, *parts: Tensor) -> None:
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.parts = tuple(torch.where(better, new, old) for new, old in zip(parts, self.parts, strict=True))


def fold(summands: Tensor) -> Tensor:
    """Sum over dimension 0, whose length is a power of two, by halves."""
    while len(summands) > 1:
        middle = len(summands) // 2
        summands = summands[:middle] + summands[middle:]
    return summands[0]


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for 0."""
    return torch.where(scale == 0, 0, 1 / scale)


def to_half(number: Tensor) -> Tensor:
    """The nearest finite half as float32; what isn't zero stays so, in order that tiny weights keep a scale."""
    half = number.clamp(-HALF_MAX, HALF_MAX).half().float()
    return torch.where((half == 0) & (number != 0), number.sign() * HALF_TINY, half)


def whole(low: int, high: int) -> Snap:
    """Rounding to the whole numbers `low` to `high`."""
    return lambda target: target.round_().clamp_(low, high)


def listed(levels: Tensor) -> Snap:
    """Rounding to any list of levels."""
    ordered = levels.sort().values
    middles = (ordered[1:] + ordered[:-1]) / 2
    return lambda target: ordered[torch.bucketize(target, middles, out_int32=True)]


def fit_rows(
    fit: Callable[[Columns], tuple[Tensor, ...]], weight: Tensor, importance: Tensor, group: int
) -> tuple[Tensor, ...]:
    """Apply `fit` to a few rows of a span at a time and join its answers, (groups or 1, rows), as (rows, groups or 1)."""
    weights = _error_weights(importance).reshape(-1, group).T.unsqueeze(-1).contiguous()
    answers = []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        values = rows.T.reshape(-1, group, len(rows)).transpose(0, 1).contiguous()
        answers.append(fit(Columns(values, weights)))
    return tuple(torch.cat(parts, 1).T.contiguous() for parts in zip(*answers, strict=True))


def _error_weights(importance: Tensor) -> Tensor:
    """Mean 1, so that nothing overflows, and never zero, so that columns whose input is dead keep sane codes."""
    mean = importance.mean()
    if mean == 0:
        return torch.ones_like(importance)
    return (importance / mean).clamp_min(1e-6)


def search_scale(columns: Columns, snap: Snap, reach: float, clips: Iterable[float], nudges: Iterable[float], signs: tuple[int, ...]) -> Tensor:
    """A scale for each group that needs no offset, (groups, rows), not yet rounded.

    `reach`: the largest level. `clips`: parts of the largest magnitude that this level should stand for, each
    tried with each of `signs` (-1: the grid reversed). `nudges`: relative changes tried on the best of them.
    """
    peak = columns.values.abs().amax(0)
    weighted = columns.values * columns.weights
    best = Best(torch.zeros_like(peak), torch.zeros_like(peak))

    def offer(scale: Tensor) -> None:
        level = columns.levels(snap, scale)
        along = fold(level * weighted)
        length = inverse(fold(level.square_().mul_(columns.weights)))
        # The least-squares scale of these levels takes along² / length off the error of all zeros.
        best.offer(-along * along * length, along * length)

    for clip, sign in product(clips, signs):
        offer(peak * (sign * clip / reach))
    for nudge in nudges:
        offer(best.parts[0] * (1 + nudge))
    return best.parts[0]


@dataclass(frozen=True)
class Moments:
    """What a least-squares line through a group needs and no code changes, (groups, rows) or (groups, 1)."""

    weight: Tensor
    value: Tensor
    square: Tensor

    @classmethod
    def of(cls, columns: Columns) -> Moments:
        weighted = columns.values * columns.weights
        return cls(fold(columns.weights), fold(weighted), fold(weighted * columns.values))


def search_affine(columns: Columns, top: int, clips: Iterable[float], nudges: Iterable[float], *, positive: bool) -> tuple[Tensor, Tensor]:
    """A scale and an offset for each group, (groups, rows) both, not yet rounded, for levels 0 to `top`.

    `clips`: parts of the lowest and of the highest value that the grid should reach, each tried with each.
    `nudges`: steps of the grid by which either end of the best is then moved out (+) or in (-). `positive`:
    the offset can't be stored with a sign, so it is never negative.
    """
    low, high = columns.values.amin(0), columns.values.amax(0)
    if positive:
        low, high = low.clamp(max=0), high.clamp(min=0)
    snap, moments = whole(0, top), Moments.of(columns)
    best = Best(torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low))

    def offer(scale: Tensor, offset: Tensor) -> None:
        level = columns.levels(snap, scale, offset)
        best.offer(*_least_squares(columns, level, moments, positive))

    # Where the range straddles nothing, parts of its ends are parts of its half-width from its middle.
    middle = torch.zeros_like(low) if positive else (low + high) / 2
    for clip_low, clip_high in product(clips, clips):
        start = middle + (low - middle) * clip_low
        offer((middle + (high - middle) * clip_high - start) / top, -start)
    for nudge in nudges:
        scale, offset = best.parts
        offer(scale * (1 + nudge / top), offset)
        scale, offset = best.parts
        offer(scale * (1 + nudge / top), offset + nudge * scale)
    return best.parts[0], best.parts[1]


def _least_squares(columns: Columns, level: Tensor, moments: Moments, positive: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Error, scale and offset of the weighted least-squares line through (level, value), (groups, rows) each."""
    weighted = level * columns.weights
    first = fold(weighted)
    cross = fold(weighted * columns.values)
    second = fold(weighted.mul_(level))
    spread = moments.weight * second - first * first
    bent = spread > 1e-6 * moments.weight * second
    over = torch.where(bent, 1 / spread, 0)
    scale = (moments.weight * cross - first * moments.value) * over
    # With one level only, its value is all in the offset.
    offset = torch.where(bent, (first * cross - second * moments.value) * over, -moments.value / moments.weight)
    if positive:
        scale = torch.where(offset < 0, cross * inverse(second), scale).clamp_min_(0)
        offset = offset.clamp_min_(0)
    return moments.square - scale * cross + offset * moments.value, scale, offset
