"""The columns of one span, rounded in turn: compiled loops.

Rows are alone, and sums run in the same order whatever rows there are: a row's codes are the same among any others and
with any number of threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from anyfit.formats.choose import Codes, choose, memory, prepare
from anyfit.formats.fitting_lanes import Floats, compiled

ROWS = 16
"""Rows whose columns are rounded by turns: their free weights stay in the nearest cache."""
VECTOR_ROWS = 128
"""At least so many where columns are coded together, as what a book prepares for a vector serves them all."""


class Order(NamedTuple):
    """What all rows of a span share, its columns in the order of rounding.

    `upper` (columns, columns): the factor's. `passed` (vectors, vector, vector): e @ passed is what is passed on of an
    error e. `metric` (vectors, vector, vector): e @ metric @ e is what it costs. `group` (columns,): of each column.
    """

    upper: Floats
    passed: Floats
    metric: Floats
    group: NDArray[np.int64]


class Grid(NamedTuple):
    """The format's `levels` (K,), and for each row and group: `scale`, its `inverse` (0 for 0), and `offset`."""

    levels: Floats
    scale: Floats
    inverse: Floats
    offset: Floats


class Rows(NamedTuple):
    """(rows, columns) each, in the order of rounding. `free`: the weights, changed to what was really rounded."""

    free: Floats
    codes: Codes
    values: Floats
    passed: Floats
    """The errors to push onto the columns of later spans, through the factor."""


@compiled
def round_rows(book: Any, order: Order, grid: Grid, rows: Rows) -> None:
    """Round all columns, each vector's errors made good by the later ones, into `rows`."""
    free, levels = rows.free, grid.levels
    num_rows, columns = free.shape
    vector = order.passed.shape[1]
    own = memory(book)
    target, codes, error = np.empty(vector, np.float32), np.empty(vector, np.uint8), np.empty(vector, np.float32)
    together = ROWS if vector == 1 else num_rows
    for begin in range(0, num_rows, together):
        for first in range(0, columns, vector):
            metric, passed, group = order.metric[first // vector], order.passed[first // vector], order.group[first]
            prepare(book, metric, own)
            for row in range(begin, min(begin + together, num_rows)):
                scale, inverse, offset = grid.scale[row, group], grid.inverse[row, group], grid.offset[row, group]
                for i in range(vector):
                    target[i] = (free[row, first + i] + offset) * inverse
                choose(book, metric, own, target, codes)
                for i in range(vector):
                    value = levels[codes[i]] * scale - offset
                    rows.codes[row, first + i], rows.values[row, first + i] = codes[i], value
                    error[i] = free[row, first + i] - value
                for i in range(vector):
                    pushed = np.float32(0)
                    for j in range(vector):
                        pushed += passed[j, i] * error[j]
                    rows.passed[row, first + i] = pushed
                    _push(pushed, order.upper, first + i, free, row, first + vector)


@compiled
def _push(error: np.float32, upper: Floats, column: int, free: Floats, row: int, first: int) -> None:
    # unsigned, so that no number is taken for one from the end: the loop isn't vectorised otherwise
    for later in range(np.uint64(first), np.uint64(free.shape[1])):
        free[row, later] -= error * upper[column, later]
