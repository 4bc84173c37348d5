"""The search for scales and offsets: value = scale * level - offset."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from anyfit.formats.fitting import Columns, numbers, whole
from anyfit.formats.fitting_lanes import (
    INFINITE,
    LANES,
    ONE,
    TWO,
    ZERO,
    Floats,
    Work,
    best_multiple,
    clip,
    compiled,
    copy,
    fill,
    inlined,
    inverse,
    keep_better,
    level_sums,
    new_work,
    round_to_levels,
    squared_error,
    to_half,
    value_moments,
)

FLAT = np.float32(1e-6)
"""Part of its terms below which a determinant is taken for rounding noise."""
NEIGHBOURS = (1.0, -1.0)
"""Whole zero points that are tried beside the best."""

CLIPS = {
    8: (1.03, 1.015, 1.0),
    7: (1.05, 1.03, 1.0),
    6: (1.06, 1.03, 1.0),
    5: (1.08, 1.04, 1.0, 0.95),
    4: (1.1, 1.03, 0.96, 0.87),
    3: (1.1, 0.97, 0.84, 0.68),
    2: (1.0, 0.85, 0.7, 0.5),
}
"""What pays for integers, by their bits. With few levels it pays to clip; with many, each grid rounds anew, and the
best of several wins."""


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

    @classmethod
    def integers(cls, num_bits: int, *, positive: bool) -> LineSearch:
        """For the levels 0 to 2**num_bits - 1."""
        return cls(2**num_bits - 1, CLIPS[num_bits], (0.5, -0.5, 0.25, -0.25), positive)

    def ideal(self, columns: Columns) -> tuple[Floats, Floats]:
        """The best scale and offset found for each group, (groups, rows), not rounded."""
        return _search_lines(columns.values, columns.weights, *self._settings(), self.positive, False)

    def halves(self, columns: Columns) -> tuple[Floats, Floats]:
        """The halves of least error as stored, (groups, rows) each."""
        return _search_lines(columns.values, columns.weights, *self._settings(), self.positive, True)

    def zero_point(self, columns: Columns) -> tuple[Floats, Floats]:
        """The half scale and whole zero point (0 to `top`) of least error as stored, (groups, rows) each."""
        snap, clips, _ = self._settings()
        return _search_zeros(columns.values, columns.weights, snap, clips, numbers(NEIGHBOURS))

    def _settings(self) -> tuple[Any, Floats, Floats]:
        clips = np.array(list(product(self.clips, self.clips)), np.float32)
        return whole(0, self.top).compiled, clips, numbers(self.nudges)


@compiled
def _search_lines(
    values: Floats, weights: Floats, snap: Any, clips: Floats, nudges: Floats, positive: bool, stored: bool
) -> tuple[Floats, Floats]:
    """Scales and offsets (groups, rows); `clips` (n, 2) are the pairs to try."""
    tiles, groups, group, _ = values.shape
    scales = np.empty((groups, tiles * LANES), np.float32)
    offsets = np.empty_like(scales)
    work, moments = new_work(group), np.empty((2, LANES), np.float32)
    for tile in range(tiles):
        for i in range(groups):
            value_moments(values[tile, i], weights[i], moments)
            _search_line(values[tile, i], weights[i], snap, clips, nudges, positive, moments, work)
            if stored:
                _settle_line(values[tile, i], weights[i], snap, positive, moments, work)
            copy(work.best[0], scales[i, tile * LANES : (tile + 1) * LANES])
            copy(work.best[1], offsets[i, tile * LANES : (tile + 1) * LANES])
    return scales, offsets


@inlined
def _search_line(
    values: Floats, weights: Floats, snap: Any, clips: Floats, nudges: Floats, positive: bool, moments: Floats, work: Work
) -> None:
    """The ideal scale and offset of one group in `work.best`."""
    scale, offset, best = work.parts[0], work.parts[1], work.best
    ends = np.empty((2, LANES), np.float32)
    _ends(values, positive, ends)
    low, high, top = ends[0], ends[1], snap[1]
    fill(work.least, INFINITE)
    fill(best[0], ZERO)
    fill(best[1], ZERO)
    for attempt in range(len(clips)):
        clip_low, clip_high = clips[attempt, 0], clips[attempt, 1]
        for lane in range(LANES):
            middle = ZERO if positive else (low[lane] + high[lane]) / TWO
            start = middle + (low[lane] - middle) * clip_low
            scale[lane] = (middle + (high[lane] - middle) * clip_high - start) / top
            offset[lane] = -start
        round_to_levels(values, scale, offset, snap, work)
        _fit_line(values, weights, moments, positive, work)
        keep_better(work.error, work.least, work.parts, work.best)
    for attempt in range(2 * len(nudges)):
        nudge = nudges[attempt // 2]
        moved = nudge if attempt % 2 else ZERO
        for lane in range(LANES):
            scale[lane] = best[0, lane] * (ONE + nudge / top)
            offset[lane] = best[1, lane] + moved * best[0, lane]
        round_to_levels(values, scale, offset, snap, work)
        _fit_line(values, weights, moments, positive, work)
        keep_better(work.error, work.least, work.parts, work.best)


@inlined
def _settle_line(values: Floats, weights: Floats, snap: Any, positive: bool, moments: Floats, work: Work) -> None:
    """From the ideal line in `work.best` to the halves of least error there."""
    parts, best = work.parts, work.best
    copy(best[0], parts[0])
    copy(best[1], parts[1])
    fill(work.least, INFINITE)
    for attempt in range(3):
        if attempt > 0:
            _fit_line(values, weights, moments, positive, work)
        for lane in range(LANES):
            parts[0, lane], parts[1, lane] = to_half(parts[0, lane]), to_half(parts[1, lane])
        squared_error(values, weights, parts[0], parts[1], snap, work)
        keep_better(work.error, work.least, work.parts, work.best)


@compiled
def _search_zeros(values: Floats, weights: Floats, snap: Any, clips: Floats, neighbours: Floats) -> tuple[Floats, Floats]:
    """Half scales and whole zero points (groups, rows); `clips` (n, 2) are the pairs to try."""
    tiles, groups, group, _ = values.shape
    scales = np.empty((groups, tiles * LANES), np.float32)
    zeros = np.empty_like(scales)
    work, ends, offset = new_work(group), np.empty((2, LANES), np.float32), np.empty(LANES, np.float32)
    for tile in range(tiles):
        for i in range(groups):
            _ends(values[tile, i], True, ends)
            _search_zero(values[tile, i], weights[i], snap, clips, neighbours, ends, offset, work)
            _settle_zero(values[tile, i], weights[i], snap, offset, work)
            copy(work.best[0], scales[i, tile * LANES : (tile + 1) * LANES])
            copy(work.best[1], zeros[i, tile * LANES : (tile + 1) * LANES])
    return scales, zeros


@inlined
def _search_zero(
    values: Floats, weights: Floats, snap: Any, clips: Floats, neighbours: Floats, ends: Floats, offset: Floats, work: Work
) -> None:
    """The ideal scale and the zero point of one group in `work.best`: of the clipped ranges' own, and the neighbours of the best.

    Scales around the best, with the same zero point, lower the weighted error, but not that of the solved matrix.
    """
    scale, zero, best, top = work.parts[0], work.parts[1], work.best, snap[1]
    low, high = ends[0], ends[1]
    fill(work.least, ZERO)
    fill(best[0], ZERO)
    fill(best[1], ZERO)
    for attempt in range(len(clips)):
        clip_low, clip_high = clips[attempt, 0], clips[attempt, 1]
        for lane in range(LANES):
            scale[lane] = (high[lane] * clip_high - low[lane] * clip_low) / top
            zero[lane] = np.rint(-low[lane] * clip_low * inverse(scale[lane]))
        _improve_multiple(values, weights, snap, offset, work)
        keep_better(work.error, work.least, work.parts, work.best)
    for step in neighbours:
        for lane in range(LANES):
            scale[lane], zero[lane] = best[0, lane], clip(best[1, lane] + step, ZERO, top)
        _improve_multiple(values, weights, snap, offset, work)
        keep_better(work.error, work.least, work.parts, work.best)


@inlined
def _settle_zero(values: Floats, weights: Floats, snap: Any, offset: Floats, work: Work) -> None:
    """From the ideal scale in `work.best` to the half of least error there, with the same zero point."""
    parts, best = work.parts, work.best
    copy(best[0], parts[0])
    copy(best[1], parts[1])
    fill(work.least, INFINITE)
    for attempt in range(3):
        if attempt > 0:
            best_multiple(values, weights, parts[1], work, parts[0])
        for lane in range(LANES):
            parts[0, lane] = to_half(parts[0, lane])
            offset[lane] = parts[0, lane] * parts[1, lane]
        squared_error(values, weights, parts[0], offset, snap, work)
        keep_better(work.error, work.least, work.parts, work.best)


@compiled
def _improve_multiple(values: Floats, weights: Floats, snap: Any, offset: Floats, work: Work) -> None:
    """Replace the scale in `work.parts` by the best for the codes that it and the zero point give."""
    scale, zero = work.parts[0], work.parts[1]
    for lane in range(LANES):
        offset[lane] = scale[lane] * zero[lane]
    round_to_levels(values, scale, offset, snap, work)
    best_multiple(values, weights, zero, work, scale)


@compiled
def _ends(values: Floats, with_zero: bool, ends: Floats) -> None:
    """`ends` (2, LANES): the lowest and highest of each lane's values (and zero)."""
    low, high = ends[0], ends[1]
    for lane in range(LANES):
        low[lane] = high[lane] = ZERO if with_zero else values[0, lane]
    for column in range(len(values)):
        for lane in range(LANES):
            value = values[column, lane]
            low[lane] = value if value < low[lane] else low[lane]
            high[lane] = value if value > high[lane] else high[lane]


@compiled
def _fit_line(values: Floats, weights: Floats, moments: Floats, positive: bool, work: Work) -> None:
    """`work.parts`: scale and offset of the weighted least-squares line through (level, value); `work.error`: its error."""
    level_sums(values, weights, work)
    sums = work.sums
    scales, offsets, error = work.parts[0], work.parts[1], work.error
    value, square = moments[0], moments[1]
    total = ZERO
    for column in range(len(weights)):
        total += weights[column]
    for lane in range(LANES):
        first, cross, second = sums[lane], sums[LANES + lane], sums[2 * LANES + lane]
        spread = total * second - first * first
        bent = spread > FLAT * total * second
        over = ONE / spread if bent else ZERO
        scale = (total * cross - first * value[lane]) * over
        # With one level only, its value is all in the offset.
        offset = (first * cross - second * value[lane]) * over if bent else -value[lane] / total
        if positive:
            scale = cross * inverse(second) if offset < ZERO else scale
            scale = ZERO if scale < ZERO else scale
            offset = ZERO if offset < ZERO else offset
        scales[lane], offsets[lane] = scale, offset
        error[lane] = square[lane] - scale * cross + offset * value[lane]
