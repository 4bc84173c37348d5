"""The columns of one span, rounded in turn: compiled loops.

Rows are alone, and sums run in the same order whatever rows there are: a row's codes are the same among any others and
with any number of threads.
"""

from __future__ import annotations

from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from anyfit.formats.choose import Codes, choose, memory, prepare
from anyfit.formats.fitting_lanes import ZERO, Floats, compiled

LANES = 128
"""Rows that are rounded together where each column is coded by itself: one instruction works on several of them, and their
free weights stay in a near cache."""
VECTOR_ROWS = 128
"""At least so many where columns are coded together, as what a book prepares for a vector serves them all."""


Array = TypeVar("Array")
"""Compiled loops take numpy's arrays; tensors lie in the same tuples before and elsewhere."""


class Order(NamedTuple, Generic[Array]):
    """What all rows share of some columns of a span, in the order of rounding.

    `upper` (columns, columns): the factor's. `passed` (vectors, vector, vector): e @ passed is what is passed on of an
    error e. `metric` (vectors, vector, vector): e @ metric @ e is what it costs. `damping` (columns,): what of that is not the
    moments' own. `place` (columns,): within the span.
    """

    upper: Array
    passed: Array
    metric: Array
    damping: Array
    place: Array


class Grid(NamedTuple, Generic[Array]):
    """The format's `levels` (K,), the columns of a `group`, and for each row and group: `scale`, its `inverse` (0 for 0), and `offset`."""

    levels: Array
    group: int
    scale: Array
    inverse: Array
    offset: Array


class Rows(NamedTuple, Generic[Array]):
    """(rows, columns) each, in the order of rounding, and `errors` (rows,) float64, to which theirs are added.

    `weights` are those of the matrix; `free`: the weights as corrected, changed to what was really rounded.
    """

    weights: Array
    free: Array
    codes: Array
    passed: Array
    """The errors to push onto later columns, through the factor."""
    errors: Array


@compiled
def round_rows(book: Any, order: Order[Any], grid: Grid[Any], rows: Rows[Any]) -> None:
    """Round all columns, each vector's errors made good by the later ones, into `rows`."""
    free, levels = rows.free, grid.levels
    num_rows, columns = free.shape
    vector = order.passed.shape[1]
    own = memory(book)
    target, codes, error = np.empty(vector, np.float32), np.empty(vector, np.uint8), np.empty(vector, np.float32)
    for first in range(0, columns, vector):
        metric, passed, group = order.metric[first // vector], order.passed[first // vector], order.place[first] // grid.group
        prepare(book, metric, own)
        for row in range(num_rows):
            scale, inverse, offset = grid.scale[row, group], grid.inverse[row, group], grid.offset[row, group]
            for i in range(vector):
                target[i] = (free[row, first + i] + offset) * inverse
            choose(book, metric, own, target, codes)
            for i in range(vector):
                value = levels[codes[i]] * scale - offset
                rows.codes[row, first + i] = codes[i]
                error[i] = free[row, first + i] - value
                away = value - rows.weights[row, first + i]
                rows.errors[row] -= order.damping[first + i] * away * away
            for i in range(vector):
                pushed = ZERO
                for j in range(vector):
                    pushed += passed[j, i] * error[j]
                rows.passed[row, first + i] = pushed
                rows.errors[row] += pushed * pushed
                _push(pushed, order.upper, first + i, free, row, first + vector)


@compiled
def round_lanes(book: Any, order: Order[Any], grid: Grid[Any], rows: Rows[Any], first: int, end: int) -> None:
    """What `round_rows` does, for `choose.Levels` and with all arrays transposed, so that rows lie side by side: those from `first`
    to `end`."""
    columns = len(rows.free)
    value = np.empty(LANES, np.float32)
    for begin in range(first, end, LANES):
        lanes = slice(begin, min(begin + LANES, end))
        errors = rows.errors[lanes]
        for column in range(columns):
            group = order.place[column] // grid.group
            scale, inverse, offset = grid.scale[group, lanes], grid.inverse[group, lanes], grid.offset[group, lanes]
            free, passed, weights = rows.free[column, lanes], rows.passed[column, lanes], rows.weights[column, lanes]
            _nearest(book, grid.levels, (scale, inverse, offset), free, rows.codes[column, lanes], value)
            share, damping = order.passed[column, 0, 0], order.damping[column]
            for lane in range(len(free)):
                pushed, away = share * (free[lane] - value[lane]), value[lane] - weights[lane]
                passed[lane] = pushed
                errors[lane] += pushed * pushed - damping * away * away
            for later in range(column + 1, columns):
                share, target = order.upper[column, later], rows.free[later, lanes]
                for lane in range(len(passed)):
                    target[lane] -= passed[lane] * share


@compiled
def _nearest(book: Any, levels: Floats, grid: tuple[Floats, Floats, Floats], free: Floats, codes: Codes, values: Floats) -> None:
    """The nearest level of each row's weight in one column: its code and its value."""
    scale, inverse, offset = grid
    if len(book.borders) == 0:
        for lane in range(len(free)):
            step = np.rint((free[lane] + offset[lane]) * inverse[lane]) - book.lowest
            # written so that what isn't a number gets a code
            step = step if step > ZERO else ZERO
            step = step if step < book.top else book.top
            codes[lane] = np.uint8(step)
            values[lane] = (step + book.lowest) * scale[lane] - offset[lane]
        return
    for lane in range(len(free)):
        codes[lane], values[lane] = 0, (free[lane] + offset[lane]) * inverse[lane]
    for border in book.borders:
        for lane in range(len(free)):
            codes[lane] += np.uint8(border < values[lane])
    for lane in range(len(free)):
        code = book.order[codes[lane]]
        codes[lane], values[lane] = code, levels[code] * scale[lane] - offset[lane]


@compiled
def _push(error: np.float32, upper: Floats, column: int, free: Floats, row: int, first: int) -> None:
    # unsigned, so that no number is taken for one from the end: the loop isn't vectorised otherwise
    for later in range(np.uint64(first), np.uint64(free.shape[1])):
        free[row, later] -= error * upper[column, later]
