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
SCALES = (np.float32(2.0), np.float32(1.2), np.float32(0.75), np.float32(0.45))
"""Where corners of envelopes are looked for first, as parts of a group's likely scale. Below the last of them no entry is looked
for: its best scale is above that in all but made-up groups, and then it gets entries that are a little worse."""


class Work(NamedTuple):
    """`places` counts from 0. `above` (num,): which entries are marked; `words`: the same memory, eight of them at a time.

    `corners` (5,): some that are on the hull, from the left. `slope` and `level` (4,): of the chords between them.
    """

    places: NDArray[np.int32]
    corners: NDArray[np.int64]
    slope: Floats
    level: Floats
    above: NDArray[np.bool_]
    words: NDArray[np.uint64]


@compiled
def new_work(num: int) -> Work:
    """For codebooks of `num` entries."""
    words = np.zeros(num // 8, np.uint64)
    chords = np.empty((2, 4), np.float32)
    return Work(np.arange(num).astype(np.int32), np.zeros(5, np.int64), chords[0], chords[1], words.view(np.bool_), words)


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
        for column in range(span):
            factors[column] = importance[column] * target[column]
        for part in range(num_parts):
            if part % len(at) == 0:
                likely = _likely(target, part // len(at) * group, group) / spread
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
def _likely(target: Doubles, first: int, group: int) -> float:
    """The root of a group's mean square; of zeros, something that isn't zero."""
    energy = 0.0
    for column in range(first, first + group):
        energy += target[column] ** 2
    return max(np.sqrt(energy / group), 1e-6)


@compiled
def _envelope(along: Floats, squares: Floats, part: int, scale: float, lines: Doubles, work: Work) -> None:
    """The entries that are best at some scale, out of all by rising square: the upper left of a convex hull, as far as `SCALES` reach.

    The first and those that are best at scales like `scale` are corners of it; any other corner is above the chords between
    these, as few entries are.
    """
    _corners(along, squares, part, np.float32(0.5 * scale), work)
    _mark(along, squares, part, work)
    last, end = 0, work.corners[-1]
    lines[0, part, 0], lines[1, part, 0] = along[0], squares[part, 0]
    for word in range(end // 8 + 1):
        if work.words[word] == 0:
            continue
        for k in range(8 * word, 8 * word + 8):
            if work.above[k] and along[k] > lines[0, part, last]:
                last = _append(lines, part, last, along[k], squares[part, k])
    lines[2, part, last] = np.inf


@compiled
def _corners(along: Floats, squares: Floats, part: int, half: np.float32, work: Work) -> None:
    """`work.corners`: the first entry, and those best at 2 * `half` times each of `SCALES`."""
    one, two, three, four = half * SCALES[0], half * SCALES[1], half * SCALES[2], half * SCALES[3]
    a, b, c, d, places = HIGHEST, HIGHEST, HIGHEST, HIGHEST, work.places
    for k in range(len(along)):
        place, square, behind = places[k], squares[part, k], -along[k]
        v, w = ranked(one * square + behind, place), ranked(two * square + behind, place)
        x, y = ranked(three * square + behind, place), ranked(four * square + behind, place)
        a, b, c, d = v if v < a else a, w if w < b else b, x if x < c else c, y if y < d else d
    corners = work.corners
    corners[1], corners[2], corners[3], corners[4] = a & PLACE, b & PLACE, c & PLACE, d & PLACE
    for i in range(1, 5):  # of numbers that are nearly the same, any may have been taken
        corners[i] = max(corners[i], corners[i - 1])


@compiled
def _mark(along: Floats, squares: Floats, part: int, work: Work) -> None:
    """Set `work.above` for the corners and for the entries above all chords between neighbours, made longer both ways."""
    corners, above, slope, level = work.corners, work.above, work.slope, work.level
    for i in range(4):
        here, there = corners[i], corners[i + 1]
        slope[i], level[i] = 0, 3e38
        if squares[part, there] > squares[part, here]:
            slope[i] = (along[there] - along[here]) / (squares[part, there] - squares[part, here])
            level[i] = along[here] - slope[i] * squares[part, here] + np.float32(1e-5) * abs(along[there])
    a, b, c, d = slope[0], slope[1], slope[2], slope[3]
    f, g, h, i = level[0], level[1], level[2], level[3]
    for k in range(len(along)):
        square = squares[part, k]
        v, w, x, y = f + a * square, g + b * square, h + c * square, i + d * square
        v, x = w if w < v else v, y if y < x else x
        above[k] = along[k] > (x if x < v else v)
    for n in range(1, 5):
        above[corners[n]] = True


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
