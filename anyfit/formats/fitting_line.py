"""The search for scales and offsets: value = scale * level - offset."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from anyfit.formats.fitting import Best, Columns, best_multiple, fold, inverse, to_half, whole


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


@dataclass(frozen=True)
class LineSearch:
    """Where to look for the scale and offset of a group, for levels 0 to `top`.

    `clips`: parts of the lowest and of the highest value that the grid should reach, each tried with each.
    `nudges`: steps of the grid by which either end of the best is then moved, out (+) or in (-).
    `positive`: offsets are never negative, so that zero is always within the grid's ends.
    """

    top: int
    clips: tuple[float, ...]
    nudges: tuple[float, ...]
    positive: bool

    def ideal(self, columns: Columns) -> tuple[Tensor, Tensor]:
        """The best scale and offset found for each group, (groups, rows), not rounded."""
        low, high = columns.values.amin(0), columns.values.amax(0)
        if self.positive:
            low, high = low.clamp(max=0), high.clamp(min=0)
        snap, moments = whole(0, self.top), Moments.of(columns)
        best = Best(torch.full_like(low, torch.inf), torch.zeros_like(low), torch.zeros_like(low))

        def offer(scale: Tensor, offset: Tensor) -> None:
            level = columns.levels(snap, scale, offset)
            best.offer(*_least_squares(columns, level, moments, self.positive))

        middle = torch.zeros_like(low) if self.positive else (low + high) / 2
        for clip_low, clip_high in product(self.clips, self.clips):
            start = middle + (low - middle) * clip_low
            offer((middle + (high - middle) * clip_high - start) / self.top, -start)
        for nudge in self.nudges:
            scale, offset = best.parts
            offer(scale * (1 + nudge / self.top), offset)
            scale, offset = best.parts
            offer(scale * (1 + nudge / self.top), offset + nudge * scale)
        return best.parts[0], best.parts[1]

    def halves(self, columns: Columns) -> tuple[Tensor, Tensor]:
        """The halves of least error as stored, (groups, rows) each, float32."""
        scale, offset = self.ideal(columns)
        snap, moments = whole(0, self.top), Moments.of(columns)
        stored = to_half(scale), to_half(offset)
        best = Best(columns.error(snap, *stored), *stored)
        for _ in range(2):
            _, scale, offset = _least_squares(columns, columns.levels(snap, *best.parts), moments, self.positive)
            stored = to_half(scale), to_half(offset)
            best.offer(columns.error(snap, *stored), *stored)
        return best.parts[0], best.parts[1]

    def zero_point(self, columns: Columns) -> tuple[Tensor, Tensor]:
        """The half scale and whole zero point (0 to `top`) of least error as stored, (groups, rows) each."""
        low, high = columns.values.amin(0).clamp(max=0), columns.values.amax(0).clamp(min=0)
        snap = whole(0, self.top)
        best = Best(torch.zeros_like(low), torch.zeros_like(low), torch.zeros_like(low))

        def improved(scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
            return best_multiple(columns, columns.levels(snap, scale, scale * zero).sub_(zero))

        for clip_low, clip_high in product(self.clips, self.clips):
            scale = (high * clip_high - low * clip_low) / self.top
            zero = (low * -clip_low * inverse(scale)).round()
            best.offer(*improved(scale, zero), zero)
        for nudge in self.nudges:
            scale, zero = best.parts
            best.offer(*improved(scale * (1 + nudge / self.top), zero), zero)
            zero = (zero + (1 if nudge > 0 else -1)).clamp(0, self.top)
            best.offer(*improved(scale, zero), zero)
        half, zero = to_half(best.parts[0]), best.parts[1]
        stored = Best(columns.error(snap, half, half * zero), half)
        for _ in range(2):
            half = to_half(improved(stored.parts[0], zero)[1])
            stored.offer(columns.error(snap, half, half * zero), half)
        return stored.parts[0], zero


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
