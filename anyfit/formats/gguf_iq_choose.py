"""Which entry of a codebook, with which signs, stands for a vector of weights: compiled loops.

The error of a difference e is e @ metric @ e. For given signs it is a quadratic form in the entry's magnitudes. Its
squares depend on the metric and the signs alone, so they are made once for all rows, and all entries are compared
exactly; then signs are flipped as long as that helps, and the entries searched again. That is within a few thousandths
of the best over all signs on metrics of real networks; judging by the metric's diagonal alone costs 2 to 3 % (40 % on
strongly correlated ones).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyfit.formats import choose
from anyfit.formats.choose import Codes, implements
from anyfit.formats.fitting_lanes import Floats, compiled, inlined

WIDTH = 8
"""Columns that share a byte of signs."""
_ROUNDS = 4
PLACE = np.int32(1023)
"""Bits for the place of an entry: no codebook has more."""
HIGHEST = np.int32(2**31 - 1)


class Codebook(NamedTuple):
    """Vectors of `WIDTH` columns, each of WIDTH / size parts that are one entry and their signs.

    `entries` (size, num): magnitudes. `codes` (num, size): theirs; a negative one's is `num_magnitudes` more. `even`: the
    number of negative signs of a vector must be even.
    """

    entries: Floats
    codes: Codes
    num_magnitudes: int
    even: bool


class Memory(NamedTuple):
    """`squares` (parts, patterns, num): the quadratic form of each entry, by which of its signs aren't the last one's.

    `cost` (num,): of each entry. `work`: numbers of each column, or of pairs of them, from the places below on; in one array,
    as each array that a function takes out of a tuple costs as much as a loop over eight numbers.
    """

    squares: Floats
    cost: Floats
    work: Floats
    chosen: NDArray[np.int64]
    places: NDArray[np.int32]


SIGN, ERROR, MAGNITUDE, PULL, CHANGE, FACTOR, PAIR, METRIC = 0, 8, 16, 24, 32, 40, 48, 112
"""In `Memory.work`: error is target minus values, pull is metric @ error. Changes, of columns and of pairs, are those of
the error, were the signs flipped."""


@implements(choose.memory, Codebook)
def _memory(book: Codebook) -> Memory:
    size, num = book.entries.shape
    parts, places = WIDTH // size, np.arange(PLACE + 1).astype(np.int32)
    squares, work = np.empty((parts, 1 << (size - 1), num), np.float32), np.empty(METRIC + WIDTH * WIDTH, np.float32)
    return Memory(squares, np.empty(num, np.float32), work, np.empty(parts, np.int64), places)


@implements(choose.prepare, Codebook)
def _prepare(book: Codebook, metric: Floats, memory: Memory) -> None:
    """Fill `memory.squares`, each pattern from one that has another sign in one place."""
    entries, squares, work, along = book.entries, memory.squares, memory.work, memory.cost
    size = len(entries)
    for i in range(WIDTH):
        for j in range(WIDTH):
            work[METRIC + WIDTH * i + j] = metric[i, j]
    for part in range(WIDTH // size):
        first = part * size
        squares[part, 0] = 0
        for i in range(size):
            for j in range(size):
                work[FACTOR + j] = metric[first + i, first + j]
            add_lines(entries, work, FACTOR, along)
            squares[part, 0] += entries[i] * along
        work[SIGN : SIGN + size] = 1
        pattern = 0
        for step in range(1, 1 << (size - 1)):
            flipped = 0
            while not step >> flipped & 1:
                flipped += 1
            for j in range(size):
                work[FACTOR + j] = 0 if j == flipped else work[SIGN + j] * metric[first + flipped, first + j]
            add_lines(entries, work, FACTOR, along)
            following = pattern ^ 1 << flipped
            _add_product(entries[flipped], along, np.float32(-4) * work[SIGN + flipped], squares[part, pattern], squares[part, following])
            work[SIGN + flipped] = -work[SIGN + flipped]
            pattern = following


@compiled
def add_lines(entries: Floats, factors: Floats, first: int, total: Floats) -> None:
    """`total` (num,): the sum of factors * entries, of `factors` from `first` on."""
    a, b, c, d = factors[first], factors[first + 1], factors[first + 2], factors[first + 3]
    for k in range(len(total)):
        total[k] = (a * entries[0, k] + b * entries[1, k]) + (c * entries[2, k] + d * entries[3, k])
    if len(entries) == WIDTH:
        a, b, c, d = factors[first + 4], factors[first + 5], factors[first + 6], factors[first + 7]
        for k in range(len(total)):
            total[k] += (a * entries[4, k] + b * entries[5, k]) + (c * entries[6, k] + d * entries[7, k])


@compiled
def _add_product(values: Floats, along: Floats, factor: np.float32, start: Floats, total: Floats) -> None:
    for k in range(len(total)):
        total[k] = start[k] + factor * values[k] * along[k]


@implements(choose.choose, Codebook)
def _choose(book: Codebook, metric: Floats, memory: Memory, target: Floats, codes: Codes) -> None:
    entries, squares, cost, work, chosen, places = book.entries, memory.squares, memory.cost, memory.work, memory.chosen, memory.places
    size = len(entries)
    parts = WIDTH // size
    _first_signs(target, book.even, work)
    chosen[:] = -1
    for i in range(WIDTH):
        work[ERROR + i] = 0
    for _ in range(_ROUNDS):
        moved = False
        # Each part is chosen in the light of the others' errors; the first knows those only afterwards.
        for turn in range(2 * parts - 1):
            part = turn % parts
            first = part * size
            for i in range(first, first + size):
                work[ERROR + i] = target[i]
            best = _nearest_entry(entries, squares, cost, work, places, part)
            moved |= chosen[part] != best
            chosen[part] = best
            for i in range(size):
                work[MAGNITUDE + first + i] = entries[i, best]
                work[ERROR + first + i] -= work[SIGN + first + i] * entries[i, best]
        # The signs are the best for these entries already where the entries didn't change.
        if not moved or not _flip(book.even, work, places):
            break
    for column in range(WIDTH):
        negative = book.num_magnitudes if work[SIGN + column] < 0 else 0
        codes[column] = book.codes[chosen[column // size], column % size] + negative


@compiled
def _first_signs(target: Floats, even: bool, work: Floats) -> None:
    """Those of the target; where their number must be even and isn't, the least important is another."""
    odd, least, lowest = False, 0, np.float32(np.inf)
    for column in range(WIDTH):
        negative = target[column] < 0
        work[SIGN + column] = -1 if negative else 1
        odd ^= negative
        counts = abs(target[column]) * work[METRIC + 9 * column]
        if counts < lowest:
            least, lowest = column, counts
    if even and odd:
        work[SIGN + least] = -work[SIGN + least]


@compiled
def _nearest_entry(entries: Floats, squares: Floats, cost: Floats, work: Floats, places: NDArray[np.int32], part: int) -> int:
    """The entry of least error for a part, where the error holds its target, elsewhere what is left."""
    size, pattern = len(entries), 0
    first = part * size
    _pull(work)
    for i in range(first, first + size):
        work[FACTOR + i] = -2 * work[SIGN + i] * work[PULL + i]
        pattern |= int(work[SIGN + i] != work[SIGN + first + size - 1]) << (i - first)
    add_lines(entries, work, FACTOR + first, cost)
    found = HIGHEST
    for k in range(len(cost)):
        here = ranked(squares[part, pattern, k] + cost[k], places[k])
        found = here if here < found else found
    return int(found & PLACE)


@compiled
def _pull(work: Floats) -> None:
    """metric @ error, all eight at once, so that it is one instruction a row."""
    a, b, c, d = work[ERROR], work[ERROR + 1], work[ERROR + 2], work[ERROR + 3]
    e, f, g, h = work[ERROR + 4], work[ERROR + 5], work[ERROR + 6], work[ERROR + 7]
    for i in range(WIDTH):
        upper = (a * work[METRIC + i] + b * work[METRIC + 8 + i]) + (c * work[METRIC + 16 + i] + d * work[METRIC + 24 + i])
        lower = (e * work[METRIC + 32 + i] + f * work[METRIC + 40 + i]) + (g * work[METRIC + 48 + i] + h * work[METRIC + 56 + i])
        work[PULL + i] = upper + lower


@inlined
def ranked(number: np.float32, place: np.int32) -> np.int32:
    """A whole number that is greater where the float is, with the place instead of its last bits.

    The least of these, and where it stands, is found by a vectorised loop, unlike the least of floats. Numbers that differ
    by less than one part in 2**13 count as the same.
    """
    bits = np.float32(number).view(np.int32)
    return ((bits ^ ((bits >> np.int32(31)) & HIGHEST)) & ~PLACE) | place


@compiled
def _flip(even: bool, work: Floats, places: NDArray[np.int32]) -> bool:
    """Flip signs, or pairs of signs, as long as the error falls, at most WIDTH times. Whether any was."""
    slack = np.float32(-1e-6) * work[METRIC]
    for flips in range(WIDTH):
        _pull(work)
        for i in range(WIDTH):
            size = work[MAGNITUDE + i]
            work[CHANGE + i] = 4 * size * (work[SIGN + i] * work[PULL + i] + size * work[METRIC + 9 * i])
        if even:
            best = _best_pair(work, places)
            if work[PAIR + best] >= slack:
                return flips > 0
            _turn(work, best // WIDTH)
            _turn(work, best % WIDTH)
        else:
            best = 0
            for i in range(1, WIDTH):
                best = i if work[CHANGE + i] < work[CHANGE + best] else best
            if work[CHANGE + best] >= slack:
                return flips > 0
            _turn(work, best)
    return True


@compiled
def _best_pair(work: Floats, places: NDArray[np.int32]) -> int:
    """The pair, WIDTH * one + other, whose signs' flip changes the error most."""
    for i in range(WIDTH):
        value, alone = 8 * work[SIGN + i] * work[MAGNITUDE + i], work[CHANGE + i]
        for j in range(WIDTH):
            both = value * (work[SIGN + j] * work[MAGNITUDE + j]) * work[METRIC + WIDTH * i + j]
            work[PAIR + WIDTH * i + j] = alone + work[CHANGE + j] + both
    for i in range(WIDTH):
        work[PAIR + 9 * i] = np.inf
    found = HIGHEST
    for k in range(WIDTH * WIDTH):
        here = ranked(work[PAIR + k], places[k])
        found = here if here < found else found
    return int(found & PLACE)


@compiled
def _turn(work: Floats, column: int) -> None:
    """Give a column the other sign."""
    work[ERROR + column] += 2 * work[SIGN + column] * work[MAGNITUDE + column]
    work[SIGN + column] = -work[SIGN + column]
