"""Scales in two levels: one half for a span of columns, times a small whole number for each group in it.

The half and the whole numbers are chosen together. Each group starts from the scale and offset that are best
for it alone. Several halves are tried, each with the whole numbers nearest to those. Then every group tries
the neighbours of its numbers, the halves are fitted anew by least squares to all codes of the span, and the
neighbours are tried again. A step is kept where the error as stored is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from anyfit.formats.fitting import Columns, Snap, numbers
from anyfit.formats.fitting_lanes import (
    INFINITE,
    LANES,
    ZERO,
    Floats,
    Work,
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
from anyfit.formats.fitting_line import FLAT


@dataclass(frozen=True)
class TwoLevel:
    """What a span can store: levels, and for each group a number from `low` to `high` for its scale.

    `divisors`: the numbers that the span's largest scale (and offset) is tried as. `moves`: changes of a
    group's numbers (scale's, offset's), tried one after another. `with_offset`: a second half and second numbers,
    from 0 to `high`, make offsets.
    """

    snap: Snap
    low: int
    high: int
    divisors: tuple[int, ...]
    moves: tuple[tuple[int, int], ...]
    with_offset: bool

    def fit(self, columns: Columns, scale: Floats, offset: Floats | None = None) -> tuple[Floats, ...]:
        """What is stored, near the groups' own `scale` and `offset`, (groups, rows).

        The scales' halves (1, rows) and numbers (groups, rows), then the offsets' where there are any.
        """
        search = Search(
            np.array([[self.low, self.high], [0, self.high]], np.float32),
            numbers(self.divisors),
            np.array([(0, 0), *self.moves], np.float32),
        )
        ideal = np.stack([scale, np.zeros_like(scale) if offset is None else offset])
        halves, whole = _fit_spans(columns.values, columns.weights, self.snap.compiled, search, ideal, self.with_offset)
        return (halves[:1], whole[0], halves[1:], whole[1]) if self.with_offset else (halves[:1], whole[0])


class Search(NamedTuple):
    """`bounds` (2, 2): lowest and highest number of scales and of offsets. `divisors` (n,), `moves` (m, 2), the first none."""

    bounds: Floats
    divisors: Floats
    moves: Floats


@compiled
def _fit_spans(values: Floats, weights: Floats, snap: Any, search: Search, ideal: Floats, with_offset: bool) -> tuple[Floats, Floats]:
    """Halves (2, rows) and numbers (2, groups, rows) from `ideal` (2, groups, rows) scales and offsets."""
    tiles, groups, group, _ = values.shape
    halves, numbers = np.empty((2, tiles * LANES), np.float32), np.empty((2, groups, tiles * LANES), np.float32)
    wanted, now, best = (
        np.zeros((2, groups, LANES), np.float32),
        np.zeros((2, 1 + groups, LANES), np.float32),
        np.zeros((2, 1 + groups, LANES), np.float32),
    )
    work = new_work(group)
    for tile in range(tiles):
        first = tile * LANES
        for kind in range(2):
            for i in range(groups):
                copy(ideal[kind, i, first:], wanted[kind, i])
        for kind in range(2 if with_offset else 1):
            if kind == 1:
                _refit_offsets(values[tile], weights, snap, wanted, work)
            _first_half(values[tile], weights, snap, search, wanted, kind, now, best, work)
        _settle(values[tile], weights, snap, search, now, best, work)
        for kind in range(2):
            copy(best[kind, 0], halves[kind, first : first + LANES])
            for i in range(groups):
                copy(best[kind, 1 + i], numbers[kind, i, first : first + LANES])
    return halves, numbers


@inlined
def _first_half(
    values: Floats, weights: Floats, snap: Any, search: Search, wanted: Floats, kind: int, now: Floats, best: Floats, work: Work
) -> None:
    """The half of one kind and its numbers, in `best`, that suit the `wanted` scales and offsets (2, groups, LANES).

    `wanted` of that kind becomes what they stand for.
    """
    peak, total = np.zeros(LANES, np.float32), np.empty(LANES, np.float32)
    for i in range(len(values)):
        for lane in range(LANES):
            ideal, largest = wanted[kind, i, lane], peak[lane]
            peak[lane] = ideal if abs(ideal) > abs(largest) else largest
    low, high = search.bounds[kind, 0], search.bounds[kind, 1]
    fill(work.least, INFINITE)
    for divisor in search.divisors:
        fill(total, ZERO)
        for lane in range(LANES):
            now[kind, 0, lane] = to_half(peak[lane] / divisor)
        for i in range(len(values)):
            for lane in range(LANES):
                whole = clip(np.rint(wanted[kind, i, lane] * inverse(now[kind, 0, lane])), low, high)
                now[kind, 1 + i, lane] = whole
                work.parts[kind, lane] = now[kind, 0, lane] * whole
                work.parts[1 - kind, lane] = wanted[1 - kind, i, lane]
            squared_error(values[i], weights[i], work.parts[0], work.parts[1], snap, work)
            for lane in range(LANES):
                total[lane] += work.error[lane]
        keep_better(total, work.least, now[kind], best[kind])
    for i in range(len(values)):
        for lane in range(LANES):
            wanted[kind, i, lane] = best[kind, 0, lane] * best[kind, 1 + i, lane]


@inlined
def _refit_offsets(values: Floats, weights: Floats, snap: Any, wanted: Floats, work: Work) -> None:
    """The best offsets for the scales, which are those stored by now, and the levels that both give."""
    for i in range(len(values)):
        scale, offset, excess = wanted[0, i], wanted[1, i], work.error
        round_to_levels(values[i], scale, offset, snap, work)
        fill(excess, ZERO)
        total = ZERO
        for column in range(values.shape[1]):
            weight = weights[i, column]
            total += weight
            for lane in range(LANES):
                excess[lane] += (work.level[column, lane] * scale[lane] - values[i, column, lane]) * weight
        for lane in range(LANES):
            mean = excess[lane] / total
            offset[lane] = ZERO if mean < ZERO else mean


@inlined
def _settle(values: Floats, weights: Floats, snap: Any, search: Search, now: Floats, best: Floats, work: Work) -> None:
    """Climb, fit both halves to the codes, climb again; row by row the better of the two stays in `best`."""
    least, total = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    fill(least, INFINITE)
    all_now, all_best = now.reshape(-1, LANES), best.reshape(-1, LANES)
    for attempt in range(2):
        for row in range(len(all_now)):
            copy(all_best[row], all_now[row])
        if attempt > 0:
            _refit_halves(values, weights, snap, best, now, work)
        _climb(values, weights, snap, search, now, total, work)
        keep_better(total, least, all_now, all_best)


@inlined
def _climb(values: Floats, weights: Floats, snap: Any, search: Search, stored: Floats, total: Floats, work: Work) -> None:
    """Each group tries the neighbours of its numbers. `total`: the error of the span after it."""
    bounds, moves = search.bounds, search.moves
    scale, offset = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    fill(total, ZERO)
    for i in range(len(values)):
        fill(work.least, INFINITE)
        for lane in range(LANES):
            work.best[0, lane], work.best[1, lane] = stored[0, 1 + i, lane], stored[1, 1 + i, lane]
        for attempt in range(len(moves)):
            for lane in range(LANES):
                number = clip(work.best[0, lane] + moves[attempt, 0], bounds[0, 0], bounds[0, 1])
                other = clip(work.best[1, lane] + moves[attempt, 1], bounds[1, 0], bounds[1, 1])
                work.parts[0, lane], work.parts[1, lane] = number, other
                scale[lane], offset[lane] = stored[0, 0, lane] * number, stored[1, 0, lane] * other
            squared_error(values[i], weights[i], scale, offset, snap, work)
            keep_better(work.error, work.least, work.parts, work.best)
        for lane in range(LANES):
            stored[0, 1 + i, lane], stored[1, 1 + i, lane] = work.best[0, lane], work.best[1, lane]
            total[lane] += work.least[lane]


@inlined
def _refit_halves(values: Floats, weights: Floats, snap: Any, stored: Floats, fitted: Floats, work: Work) -> None:
    """`fitted.half`: the weighted least-squares halves for the codes that `stored` gives, two unknowns for a span."""
    sums = np.zeros((5, LANES), np.float32)
    for i in range(len(values)):
        number, other = stored[0, 1 + i], stored[1, 1 + i]
        for lane in range(LANES):
            work.parts[0, lane], work.parts[1, lane] = stored[0, 0, lane] * number[lane], stored[1, 0, lane] * other[lane]
        round_to_levels(values[i], work.parts[0], work.parts[1], snap, work)
        level_sums(values[i], weights[i], work)
        value_moments(values[i], weights[i], work.parts)
        total = ZERO
        for column in range(values.shape[1]):
            total += weights[i, column]
        for lane in range(LANES):
            sums[0, lane] += number[lane] * work.sums[LANES + lane]
            sums[1, lane] += number[lane] * other[lane] * work.sums[lane]
            sums[2, lane] += number[lane] * number[lane] * work.sums[2 * LANES + lane]
            sums[3, lane] += other[lane] * other[lane] * total
            sums[4, lane] += other[lane] * work.parts[0, lane]
    for lane in range(LANES):
        value, mixed, square = sums[0, lane], sums[1, lane], sums[2, lane]
        other_square, other_value = sums[3, lane], sums[4, lane]
        determinant = square * other_square - mixed * mixed
        if determinant > FLAT * square * other_square:
            fitted[0, 0, lane] = to_half((value * other_square - mixed * other_value) / determinant)
            fitted[1, 0, lane] = to_half((mixed * value - square * other_value) / determinant)
        else:
            fitted[0, 0, lane] = to_half(value * inverse(square))
            fitted[1, 0, lane] = ZERO
