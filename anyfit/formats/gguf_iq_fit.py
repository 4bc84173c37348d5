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

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyfit.formats.fitting_lanes import HALF_TINY, Floats, compiled, to_half
from anyfit.formats.gguf_iq_choose import HIGHEST, PLACE, WIDTH, add_lines, ranked

Doubles = NDArray[np.float64]
LINES = 48
"""At most so many entries of an envelope are kept."""
NUMBERS = 16


class Work(NamedTuple):
    """`places` counts from 0. `above` (num,): which entries are marked; `words`: the same memory, eight of them at a time."""

    places: NDArray[np.int32]
    above: NDArray[np.bool_]
    words: NDArray[np.uint64]


@compiled
def new_work(num: int) -> Work:
    """For codebooks of `num` entries."""
    words = np.zeros(num // 8, np.uint64)
    return Work(np.arange(num).astype(np.int32), words.view(np.bool_), words)


class Parts(NamedTuple):
    """What all rows share of each part, its entries by rising `squares`, (parts, num): weighted sums of squares.

    `entries` (parts, size, num): magnitudes.
    """

    squares: Floats
    entries: Floats


def parts_of(importance: Floats, entries: Floats) -> Parts:
    """For columns of a span with this `importance` (span,); `entries` (size, num) magnitudes."""
    counted, squares = importance.reshape(-1, len(entries)), np.float32(0)
    for i, values in enumerate(entries):  # no matrix product, which may sum in another order on another machine
        squares = squares + counted[:, i, None] * values**2
    order = squares.argsort(1, kind="stable")
    return Parts(np.take_along_axis(squares, order, 1), np.ascontiguousarray(entries[:, order].transpose(1, 0, 2)))


@compiled
def fit(
    weight: Floats, importance: Floats, parts: Parts, even: bool, group: int, unit: float, halves: Floats, numbers: NDArray[np.uint8]
) -> None:
    """The half (rows,) and the number of each group (rows, groups) for `weight` (rows, span).

    A group's scale is unit * half * (2 * number + 1). `importance` (span,) positive.
    """
    span = weight.shape[1]
    num_parts, size, num = parts.entries.shape
    num_groups = span // group
    target, along, factors = np.empty(span), np.empty(num, np.float32), np.empty(span, np.float32)
    at, work, spread = np.empty(num_parts // num_groups, np.int64), new_work(num), np.sqrt((parts.entries[0] ** 2).mean())
    # each: along and square of a line (of the sum of lines), and where, as 1 / scale, the next one takes over
    lines, sums = np.empty((3, num_parts, LINES)), np.empty((3, num_groups, len(at) * (LINES - 1) + 1))
    # of each group: the scale of least error, and that error; in which step it is
    ideal, home, trial = np.empty((2, num_groups)), np.empty(num_groups, np.int64), np.empty(num_groups, np.uint8)
    for row in range(len(weight)):
        halves[row] = 0
        numbers[row] = 0
        peak = 0.0
        for column in range(span):
            peak = max(peak, abs(float(weight[row, column])))
        if peak == 0:
            continue
        _signed(weight[row], importance, peak, even, target)
        energy = 0.0
        for column in range(span):
            factors[column] = importance[column] * target[column]
            energy += target[column] ** 2
        likely = np.sqrt(energy / span) / spread
        for part in range(num_parts):
            add_lines(parts.entries[part], factors, part * size, along)
            _envelope(along, parts.squares, part, likely, lines, work)
        for i in range(num_groups):
            home[i], ideal[0, i], ideal[1, i] = _add_up(lines, sums, at, i)
        halves[row] = _two_level(sums, home, ideal, peak, unit, trial, numbers[row])


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


@compiled
def _envelope(along: Floats, squares: Floats, part: int, scale: float, lines: Doubles, work: Work) -> None:
    """The entries that are best at some scale, out of all by rising square: the upper left of a convex hull.

    The one that goes furthest along and the one that is best at a likely `scale` are corners of it; any other corner is
    above one of the two chords, as few are, and is found from the left.
    """
    middle, end = _corners(along, squares, part, np.float32(0.5 * scale), work.places)
    middle = min(middle, end)
    work.above[:] = False
    _mark(along, squares, part, 0, middle, work.above)
    _mark(along, squares, part, middle, end, work.above)
    work.above[middle] = work.above[end] = True
    last = 0
    lines[0, part, 0], lines[1, part, 0] = along[0], squares[part, 0]
    for word in range(end // 8 + 1):
        if work.words[word] == 0:
            continue
        for k in range(8 * word, 8 * word + 8):
            if work.above[k] and along[k] > lines[0, part, last]:
                last = _append(lines, part, last, along[k], squares[part, k])
    lines[2, part, last] = np.inf


@compiled
def _corners(along: Floats, squares: Floats, part: int, slope: np.float32, places: NDArray[np.int32]) -> tuple[int, int]:
    """Where along - slope * square is largest, and where along is."""
    middle, end = HIGHEST, HIGHEST
    for k in range(len(along)):
        one, other = ranked(slope * squares[part, k] - along[k], places[k]), ranked(-along[k], places[k])
        middle, end = one if one < middle else middle, other if other < end else end
    return int(middle & PLACE), int(end & PLACE)


@compiled
def _mark(along: Floats, squares: Floats, part: int, first: int, last: int, above: NDArray[np.bool_]) -> None:
    """Set `above` where an entry is above the chord of two, between them."""
    slope = (along[last] - along[first]) / max(squares[part, last] - squares[part, first], np.float32(1e-30))
    level = along[first] - slope * squares[part, first] + np.float32(1e-6) * abs(along[last])
    # unsigned, so that no number is taken for one from the end: the loop isn't vectorised otherwise
    for k in range(np.uint64(first), np.uint64(last)):
        above[k] = along[k] - slope * squares[part, k] > level


@compiled
def _append(lines: Doubles, part: int, last: int, along: float, square: float) -> int:
    """Add a line that goes further along than the `last` one, in place of those that are the lowest nowhere any more."""
    place = 0.5 * (square - lines[1, part, last]) / (along - lines[0, part, last])
    while last > 0 and place <= lines[2, part, last - 1]:
        last -= 1
        place = 0.5 * (square - lines[1, part, last]) / (along - lines[0, part, last])
    if last > 0 or place > 0:
        lines[2, part, last] = place
        last = min(last + 1, LINES - 1)
    lines[0, part, last], lines[1, part, last] = along, square
    return last


@compiled
def _add_up(lines: Doubles, sums: Doubles, at: NDArray[np.int64], group: int) -> tuple[int, float, float]:
    """Write the sums of a group's parts, from the largest scale down, each part moving on where its next line takes over.

    At which step the scale of least error is (0 where no positive one helps), that scale, and that error.
    """
    num = len(at)
    first = group * num
    at[:] = 0
    along, squares = 0.0, 0.0
    for part in range(first, first + num):
        along += lines[0, part, 0]
        squares += lines[1, part, 0]
    most, step, home, ideal = 0.0, 0, 0, 0.0
    while True:
        sums[0, group, step], sums[1, group, step] = along, squares
        if along > 0 and along * along > most * squares:
            most, home, ideal = along * along / squares, step, along / squares
        next_, place = 0, np.inf
        for part in range(num):
            if lines[2, first + part, at[part]] < place:
                next_, place = part, lines[2, first + part, at[part]]
        sums[2, group, step] = place
        if place == np.inf:
            return home, ideal, -most
        line, part = at[next_], first + next_
        along += lines[0, part, line + 1] - lines[0, part, line]
        squares += lines[1, part, line + 1] - lines[1, part, line]
        at[next_] += 1
        step += 1


@compiled
def _two_level(
    sums: Doubles, home: NDArray[np.int64], ideal: Doubles, peak: float, unit: float, trial: NDArray[np.uint8], numbers: NDArray[np.uint8]
) -> float:
    """The half of a span whose error with the best numbers is least, and these numbers."""
    top = 0.0
    for scale in ideal[0]:
        top = max(top, scale)
    best, best_half = np.inf, 0.0
    for step in range(4 * NUMBERS):
        # the largest ideal scale falls on odd numbers from a little beyond the largest number down to half of it
        half = _half(top * peak / (unit * (2 * NUMBERS + 3 - 0.3 * step)))
        error, _ = _numbers(sums, home, ideal, half * unit / peak, 0, best, trial)
        if error < best:
            best, best_half = error, half
    half = best_half
    for _ in range(5):
        error, refit = _numbers(sums, home, ideal, half * unit / peak, 1, np.inf, trial)
        if error > best:
            break
        best, best_half = error, half
        numbers[:] = trial
        half = _half(half * refit)
    return best_half


@compiled
def _numbers(
    sums: Doubles, home: NDArray[np.int64], ideal: Doubles, base: float, reach: int, enough: float, numbers: NDArray[np.uint8]
) -> tuple[float, float]:
    """The best number of each group, at most `reach` from the one nearest to its ideal scale, for scales
    base * (2 * number + 1): the span's error, and by which factor `base` would fit the entries better.

    Gives up where even with each group's least error from there on it isn't below `enough`; the error is then infinite.
    """
    error, total_along, total_square, bound = 0.0, 0.0, 0.0, 0.0
    for group in range(len(home)):
        bound += ideal[1, group]
    for group in range(len(home)):
        if bound >= enough:
            return np.inf, 1.0
        # clamped while it is a float: the smallest half may be far larger or smaller than the ideal
        middle = int(min(max((ideal[0, group] / base - 1) / 2, 0.0), NUMBERS - 1.0) + 0.5)
        lowest, lowest_along, lowest_square = np.inf, 0.0, 0.0
        for number in range(max(middle - reach, 0), min(middle + reach, NUMBERS - 1) + 1):
            scale, step = base * (2 * number + 1), home[group]
            # which lines are lowest there, not far from where the ideal scale is
            while sums[2, group, step] < 1 / scale:
                step += 1
            while step > 0 and sums[2, group, step - 1] >= 1 / scale:
                step -= 1
            part, whole = sums[0, group, step] * scale, sums[1, group, step] * scale * scale
            if whole - 2 * part < lowest:
                lowest, lowest_along, lowest_square = whole - 2 * part, part, whole
                numbers[group] = number
        error += lowest
        bound += lowest - ideal[1, group]
        total_along += lowest_along
        total_square += lowest_square
    return error, total_along / total_square


@compiled
def _half(number: float) -> float:
    """The nearest finite half that isn't zero, of a number that isn't negative."""
    return float(max(to_half(np.float32(number)), HALF_TINY))
