"""Scales for codebooks: compiled loops.

A part of a row (as many columns as an entry has) that is stored as `scale * entry` has the error
scale² * square - 2 * scale * along + constant, with `square` the weighted sum of the entry's squares and `along` its
weighted product with the weights. So over 1 / scale each entry is a straight line, and which entry is best at which
scale is the lower envelope of these lines: some ten entries of hundreds. On it the best scale of a group is found
exactly, by passing through all places where one of its parts changes its entry; and the error of any scale, hence of
any pair of half and number, is known from a few comparisons. Signs are those of the weights, with one flipped where
the count must be even.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from anyfit.formats.fitting_lanes import HALF_TINY, Floats, compiled, to_half
from anyfit.formats.gguf_iq_choose import WIDTH, first_least

Doubles = NDArray[np.float64]
LINES = 48
"""At most so many entries of an envelope are kept."""
NUMBERS = 16


@compiled
def fit(
    weight: Floats, importance: Floats, entries: Floats, even: bool, group: int, unit: float
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """The half (rows,) and the number of each group (rows, groups) for `weight` (rows, span).

    A group's scale is unit * half * (2 * number + 1). `importance` (span,) positive; `entries` (size, num) magnitudes.
    """
    rows, span = weight.shape
    size, num = entries.shape
    halves, numbers = np.zeros(rows, np.float32), np.zeros((rows, span // group), np.uint8)
    squares = _squares(importance, entries)
    target, along = np.empty(span), np.empty(num, np.float32)
    # (parts, lines): along and square of each line, and where, as 1 / scale, the next one takes over
    lines = np.empty((3, span // size, LINES))
    ideal = np.empty(span // group)
    for row in range(rows):
        peak = 0.0
        for column in range(span):
            peak = max(peak, abs(float(weight[row, column])))
        if peak == 0:
            continue
        _signed(weight[row], importance, peak, even, target)
        for part in range(span // size):
            along[:] = 0
            for i in range(size):
                column = part * size + i
                factor, values = np.float32(importance[column] * target[column]), entries[i]
                for k in range(num):
                    along[k] += factor * values[k]
            _envelope(along, squares[part], lines[:, part])
        for i in range(span // group):
            ideal[i] = _best_scale(lines, i * group // size, (i + 1) * group // size)
        halves[row] = _two_level(lines, ideal, peak, unit, numbers[row])
    return halves, numbers


@compiled
def _squares(importance: Floats, entries: Floats) -> Floats:
    """Weighted sums of squares of each entry at each part, (parts, num)."""
    size, num = entries.shape
    squares = np.zeros((len(importance) // size, num), np.float32)
    for column in range(len(importance)):
        for k in range(num):
            squares[column // size, k] += importance[column] * entries[column % size, k] ** 2
    return squares


@compiled
def _signed(weight: Floats, importance: Floats, peak: float, even: bool, target: Doubles) -> None:
    """Magnitudes relative to the peak; the least important of a vector is negative where its signs must be repaired."""
    for first in range(0, len(weight), WIDTH):
        odd, least = False, first
        for column in range(first, first + WIDTH):
            odd ^= weight[column] < 0
            target[column] = abs(float(weight[column])) / peak
            if importance[column] * target[column] < importance[least] * target[least]:
                least = column
        if even and odd:
            target[least] = -target[least]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def _envelope(along: Floats, square: Floats, lines: Doubles) -> None:
    """The entries that are best at some scale, from the largest scale to the smallest."""
    num = len(along)
    place = np.empty(num, np.float32)
    now = first_least(square)
    for line in range(LINES):
        lines[0, line], lines[1, line], lines[2, line] = along[now], square[now], np.inf
        here, base = along[now], square[now]
        for k in range(num):
            further = along[k] - here
            place[k] = (square[k] - base) / further if further > 0 else np.float32(3e38)
        following = first_least(place)
        if line == LINES - 1 or place[following] >= 3e38:
            return
        lines[2, line] = max(0.5 * place[following], 0.0)
        now = following


@compiled
def _best_scale(lines: Doubles, first: int, last: int) -> float:
    """The scale of least error of the group of parts `first` to `last`; 0 where no positive one helps."""
    at = np.zeros(last - first, np.int64)
    along, square = lines[0, first:last, 0].sum(), lines[1, first:last, 0].sum()
    best, scale = 0.0, 0.0
    while True:
        if along > 0 and along * along > best * square:
            best, scale = along * along / square, along / square
        following, place = 0, np.inf
        for part in range(last - first):
            if lines[2, first + part, at[part]] < place:
                following, place = part, lines[2, first + part, at[part]]
        if place == np.inf:
            return scale
        line, part = at[following], first + following
        along += lines[0, part, line + 1] - lines[0, part, line]
        square += lines[1, part, line + 1] - lines[1, part, line]
        at[following] += 1


@compiled
def _two_level(lines: Doubles, ideal: Doubles, peak: float, unit: float, numbers: NDArray[np.uint8]) -> float:
    """The half of a span whose error with the best numbers is least, and these numbers."""
    top = 0.0
    for scale in ideal:
        top = max(top, scale)
    trial = np.zeros_like(numbers)
    best, best_half = np.inf, 0.0
    for step in range(4 * NUMBERS):
        # the largest ideal scale falls on odd numbers from a little beyond the largest number down to half of it
        half = _half(top * peak / (unit * (2 * NUMBERS + 3 - 0.3 * step)))
        error, _ = _numbers(lines, ideal, half * unit / peak, 0, trial)
        if error < best:
            best, best_half = error, half
    half = best_half
    for _ in range(5):
        error, refit = _numbers(lines, ideal, half * unit / peak, 1, trial)
        if error > best:
            break
        best, best_half = error, half
        numbers[:] = trial
        half = _half(half * refit)
    return best_half


@compiled
def _numbers(lines: Doubles, ideal: Doubles, base: float, reach: int, numbers: NDArray[np.uint8]) -> tuple[float, float]:
    """The best number of each group, at most `reach` from the one nearest to its ideal scale, for scales
    base * (2 * number + 1): the span's error, and by which factor `base` would fit the entries better."""
    parts = lines.shape[1] // len(ideal)
    error, total_along, total_square = 0.0, 0.0, 0.0
    for group in range(len(ideal)):
        # clamped while it is a float: the smallest half may be far larger or smaller than the ideal
        middle = int(min(max((ideal[group] / base - 1) / 2, 0.0), NUMBERS - 1.0) + 0.5)
        least, least_along, least_square = np.inf, 0.0, 0.0
        for number in range(max(middle - reach, 0), min(middle + reach, NUMBERS - 1) + 1):
            scale = base * (2 * number + 1)
            along, square = _at(lines, group * parts, (group + 1) * parts, 1 / scale)
            along, square = along * scale, square * scale * scale
            if square - 2 * along < least:
                least, least_along, least_square = square - 2 * along, along, square
                numbers[group] = number
        error += least
        total_along += least_along
        total_square += least_square
    return error, total_along / total_square


@compiled
def _at(lines: Doubles, first: int, last: int, inverse: float) -> tuple[float, float]:
    """Sums of along and square of the lines that are lowest at this 1 / scale, of parts `first` to `last`."""
    along, square = 0.0, 0.0
    for part in range(first, last):
        line = 0
        while lines[2, part, line] < inverse:
            line += 1
        along += lines[0, part, line]
        square += lines[1, part, line]
    return along, square


@compiled
def _half(number: float) -> float:
    """The nearest finite half that isn't zero, of a number that isn't negative."""
    return float(max(to_half(np.float32(number)), HALF_TINY))
