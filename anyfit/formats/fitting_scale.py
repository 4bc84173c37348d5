"""The search for scales of grids without offsets."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anyfit.formats.fitting import Columns, Snap, numbers, whole
from anyfit.formats.fitting_lanes import (
    INFINITE,
    LANES,
    ONE,
    ZERO,
    Floats,
    Work,
    best_multiple,
    compiled,
    copy,
    fill,
    inlined,
    keep_better,
    new_work,
    round_to_levels,
    squared_error,
    to_half,
)

CLIPPED = {
    8: (-8, -7, -6, -5, -4, -3, -2, -1, 0, 1),
    7: (-8, -7, -6, -5, -4, -3, -2, -1, 0, 1),
    6: (-8, -7, -6, -5, -4, -3, -2, -1, 0, 1),
    5: (-4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2),
    4: (-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4.5),
    3: (-1, -0.5, 0, 0.5, 1, 1.5, 2, 3),
    2: (-1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4.5),
}
"""What pays for integers, by their bits. With few levels it pays to clip; with many, each scale rounds anew, and the
best of several wins."""


@dataclass(frozen=True)
class ScaleSearch:
    """Where to look for the scale of a group.

    `reach`: the largest level. `clipped`: levels beyond it that the group's largest magnitude may fall on and
    be clipped from (negative: levels that stay unused), each tried with each of `signs` (-1: the grid
    reversed). `nudges`: changes of the best scale, in levels at the end of the grid.
    """

    snap: Snap
    reach: float
    clipped: tuple[float, ...]
    nudges: tuple[float, ...] = (0.3, -0.3, 0.15, -0.15)
    signs: tuple[int, ...] = (1, -1)

    @classmethod
    def integers(cls, num_bits: int) -> ScaleSearch:
        """For the levels -2**(num_bits - 1) to 2**(num_bits - 1) - 1."""
        reach = 2 ** (num_bits - 1)
        return cls(whole(-reach, reach - 1), reach, CLIPPED[num_bits])

    def ideal(self, columns: Columns) -> Floats:
        """The best scale found for each group, (groups, rows), not rounded."""
        return self._search(columns, False)

    def half(self, columns: Columns) -> tuple[Floats]:
        """The half of least error as stored for each group, (groups, rows)."""
        return (self._search(columns, True),)

    def _search(self, columns: Columns, stored: bool) -> Floats:
        starts = numbers(tuple(sign / (self.reach + clipped) for clipped, sign in product(self.clipped, self.signs)))
        factors = numbers(tuple(1 + nudge / self.reach for nudge in self.nudges))
        return _search(columns.values, columns.weights, self.snap.compiled, starts, factors, stored)


def power_of_two(columns: Columns, snap: Snap, lowest: int, highest: int) -> NDArray[np.int32]:
    """The exponent e, within bounds, whose scale 2**e has the least error, (groups, rows).

    For levels up to 12. Both bounds and the sums with 6 are exponents of normal float32 numbers.
    """
    return _search_powers(columns.values, columns.weights, snap.compiled, lowest, highest)


@compiled
def _search(values: Floats, weights: Floats, snap: Any, starts: Floats, factors: Floats, stored: bool) -> Floats:
    """Scales (groups, rows): those of `starts` times the largest magnitude, then `factors` times the best one."""
    tiles, groups, group, _ = values.shape
    found = np.empty((groups, tiles * LANES), np.float32)
    work = new_work(group)
    for tile in range(tiles):
        for i in range(groups):
            _search_group(values[tile, i], weights[i], snap, starts, factors, work)
            if stored:
                _settle(values[tile, i], weights[i], snap, work)
            copy(work.best[0], found[i, tile * LANES : (tile + 1) * LANES])
    return found


@inlined
def _search_group(values: Floats, weights: Floats, snap: Any, starts: Floats, factors: Floats, work: Work) -> None:
    """The ideal scale of one group in `work.best[0]`."""
    scale, best = work.parts[0], work.best[0]
    peak = work.parts[1]
    largest_magnitude(values, peak)
    fill(best, ZERO)
    fill(work.least, ZERO)
    for attempt in range(len(starts) + len(factors)):
        for lane in range(LANES):
            scale[lane] = peak[lane] * starts[attempt] if attempt < len(starts) else best[lane] * factors[attempt - len(starts)]
        round_to_levels(values, scale, None, snap, work)
        best_multiple(values, weights, None, work, scale)
        keep_better(work.error, work.least, work.parts, work.best)


@inlined
def _settle(values: Floats, weights: Floats, snap: Any, work: Work) -> None:
    """From the ideal scale in `work.best[0]` to the half of least error there."""
    scale, best = work.parts[0], work.best[0]
    copy(best, scale)
    fill(work.least, INFINITE)
    for attempt in range(3):
        if attempt > 0:
            best_multiple(values, weights, None, work, scale)
        for lane in range(LANES):
            scale[lane] = to_half(scale[lane])
        squared_error(values, weights, scale, None, snap, work)
        keep_better(work.error, work.least, work.parts, work.best)


@compiled
def largest_magnitude(values: Floats, peak: Floats) -> None:
    """`peak`: the largest magnitude of each lane's values."""
    fill(peak, ZERO)
    for column in range(len(values)):
        for lane in range(LANES):
            size = abs(values[column, lane])
            peak[lane] = size if size > peak[lane] else peak[lane]


@compiled
def _search_powers(values: Floats, weights: Floats, snap: Any, lowest: int, highest: int) -> NDArray[np.int32]:
    """Exponents (groups, rows) near that of the largest magnitude."""
    tiles, groups, group, _ = values.shape
    found = np.empty((groups, tiles * LANES), np.int32)
    work, near_one = new_work(group), np.empty((group, LANES), np.float32)
    top, factor = np.empty(LANES, np.int32), np.empty(LANES, np.float32)
    peak, scale, exponent = work.error, work.parts[0], work.parts[1]
    for tile in range(tiles):
        for i in range(groups):
            largest_magnitude(values[tile, i], peak)
            for lane in range(LANES):
                top[lane] = min(max(math.frexp(peak[lane])[1], lowest + 4), highest + 3)
                # Powers of two are exact: with the peak near 1, no square can under- or overflow.
                factor[lane] = math.ldexp(ONE, -top[lane])
            for column in range(group):
                for lane in range(LANES):
                    near_one[column, lane] = values[tile, i, column, lane] * factor[lane]
            fill(work.least, INFINITE)
            for step in (-6, -5, -4, -3):
                for lane in range(LANES):
                    clipped = min(max(top[lane] + step, lowest), highest)
                    exponent[lane] = clipped
                    scale[lane] = math.ldexp(ONE, clipped - top[lane])
                squared_error(near_one, weights[i], scale, None, snap, work)
                keep_better(work.error, work.least, work.parts, work.best)
            for lane in range(LANES):
                found[i, tile * LANES + lane] = np.int32(work.best[1, lane])
    return found
