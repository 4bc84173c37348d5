"""Compiled arithmetic of the searches for scales, on `LANES` rows at a time.

All numbers are float32. `values` are (group, LANES): the columns of one group, each for `LANES` rows, which lie
side by side in memory so that one instruction works on several of them. `weights` are (group,). What a row has
one of per group is (LANES,), called a lane array here. No number of one row ever meets one of another, sums run
over the columns in order, and nothing is reassociated: a row's result is the same to the bit on any machine and
among any other rows.

Numba compiles a function on its first call and keeps the result on disk. Callers own all memory, as taking it
would cost as much as the arithmetic.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from llvmlite.binding import get_host_cpu_features
from numba import config, njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]

LANES = 128
"""Enough for the check of a loop's memory to cost little, few enough for a group to stay in the nearest cache."""
CACHE_LINE = 16
"""Numbers of a row that are read at a time; divides every group."""
HALF_MAX = np.float32(65504)
HALF_TINY = np.float32(2.0**-24)
HALF_NORMAL = np.float32(2.0**-14)
FLOAT_TINY = np.float32(2.0**-126)
EXPONENT = np.int32(0x7F800000)
ZERO, ONE, TWO, EIGHT_THOUSAND = np.float32(0), np.float32(1), np.float32(2), np.float32(2**13)
INFINITE = np.float32(np.inf)


def _use_whole_vectors() -> None:
    """LLVM halves the vectors of CPUs with 512 bits, for the sake of older ones, whose clock fell with wide ones."""
    features = get_host_cpu_features().flatten()
    if config.CPU_FEATURES is None and config.CPU_NAME is None and "+avx512f" in features:
        config.CPU_FEATURES = f"{features},-prefer-256-bit"


_use_whole_vectors()


def compiled(function: Any) -> Any:
    """Compile a function on its first call; kept on disk where there is a place that can be written to."""
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no such place
        return njit(**options)(function)


inlined: Any = njit(inline="always", error_model="numpy")
"""For pieces of one compiled function: on their own, they would be compiled twice."""


def _forget_outdated() -> None:
    """Drop what numba keeps on disk of compiled functions where a file is newer: it only looks at a function's own file."""
    package = Path(__file__).parents[1]
    folders = package / "formats", package / "quantizers"
    newest = max(path.stat().st_mtime for folder in folders for path in folder.glob("*.py"))
    for index in (index for folder in folders for index in (folder / "__pycache__").glob("*.nbi")):
        with suppress(OSError):  # gone by now, or another user's and so never read
            if index.stat().st_mtime < newest:
                index.unlink()


_forget_outdated()


class Work(NamedTuple):
    """Memory that the functions below write to: `level` (group, LANES) and lane arrays."""

    level: Floats
    inverses: Floats
    cells: NDArray[np.int32]
    sums: Floats
    """(3 * LANES,)"""
    error: Floats
    least: Floats
    """The least error so far."""
    parts: Floats
    """(2, LANES): what the error belongs to, a scale and an offset."""
    best: Floats
    """(2, LANES): what the least error belongs to."""


@compiled
def new_work(group: int) -> Work:
    """Memory for groups of `group` columns."""
    lanes = np.zeros((7, LANES), np.float32)
    sums, cells = np.zeros(3 * LANES, np.float32), np.zeros(LANES, np.int32)
    level = np.zeros((group, LANES), np.float32)
    return Work(level, lanes[0], cells, sums, lanes[1], lanes[2], lanes[3:5], lanes[5:7])


@compiled
def to_tiles(weight: Floats, tiles: Floats) -> None:
    """Write `weight` (rows, columns) to `tiles` (tiles, columns, LANES), with zeros for the rows that lack."""
    rows, columns = weight.shape
    for tile in range(len(tiles)):
        for first in range(0, columns, CACHE_LINE):
            for lane in range(LANES):
                row = tile * LANES + lane
                for column in range(first, first + CACHE_LINE):
                    tiles[tile, column, lane] = weight[row, column] if row < rows else ZERO


@compiled
def fill(some: Floats, number: np.float32) -> None:
    """Set all of an array of one dimension."""
    for i in range(len(some)):
        some[i] = number


@compiled
def copy(source: Floats, target: Floats) -> None:
    """Write an array of one dimension, or its beginning, to another."""
    for i in range(len(target)):
        target[i] = source[i]


@compiled
def inverse(scale: np.float32) -> np.float32:
    """1 / scale, and 0 where that would not be finite."""
    return ZERO if abs(scale) < FLOAT_TINY else ONE / scale


@compiled
def clip(number: np.float32, low: np.float32, high: np.float32) -> np.float32:
    """The nearest number from `low` to `high`."""
    number = low if number < low else number
    return high if number > high else number


@compiled
def to_half(number: np.float32) -> np.float32:
    """The nearest finite half as float32, ties to even; what isn't zero stays so, in order that tiny weights keep a scale."""
    size = clip(abs(number), ZERO, HALF_MAX)
    power = np.int32(np.float32(size).view(np.int32) & EXPONENT).view(np.float32)
    # The sum's last bit is worth what a half's is: 2**-10 of its power of two, and never less than 2**-24.
    magic = (power if power > HALF_NORMAL else HALF_NORMAL) * EIGHT_THOUSAND
    half = (size + magic) - magic
    half = HALF_TINY if half == ZERO and size > ZERO else half
    return -half if number < ZERO else half


@compiled
def round_to_levels(values: Floats, scale: Floats, offset: Floats | None, snap: Any, work: Work) -> None:
    """`work.level`: those nearest to `(values + offset) / scale`; `snap` is (low, high, table), see `fitting.Snap`."""
    level, inverses, cells = work.level, work.inverses, work.cells
    low, high, table = snap
    for lane in range(LANES):
        inverses[lane] = inverse(scale[lane])
    for column in range(len(values)):
        if len(table) == 0:
            for lane in range(LANES):
                value = values[column, lane] if offset is None else values[column, lane] + offset[lane]
                level[column, lane] = np.rint(clip(value * inverses[lane], low, high))
            continue
        for lane in range(LANES):
            value = values[column, lane] if offset is None else values[column, lane] + offset[lane]
            cells[lane] = np.int32((clip(value * inverses[lane], low, high) - low) * TWO)
        for lane in range(LANES):
            level[column, lane] = table[np.uint32(cells[lane])]


@compiled
def squared_error(values: Floats, weights: Floats, scale: Floats, offset: Floats | None, snap: Any, work: Work) -> None:
    """`work.error`: the weighted squared error of rounding on the grid `scale * level - offset`."""
    round_to_levels(values, scale, offset, snap, work)
    level, error = work.level, work.error
    fill(error, ZERO)
    for column in range(len(values)):
        weight = weights[column]
        for lane in range(LANES):
            rounded = level[column, lane] * scale[lane]
            away = rounded - values[column, lane] if offset is None else rounded - offset[lane] - values[column, lane]
            error[lane] += away * away * weight


@compiled
def level_sums(values: Floats, weights: Floats, work: Work) -> None:
    """`work.sums`: the weighted sums of levels, of levels times values, and of squares of levels, one after another."""
    level, sums = work.level, work.sums
    fill(sums, ZERO)
    for column in range(len(values)):
        weight = weights[column]
        for lane in range(LANES):
            weighted = level[column, lane] * weight
            sums[lane] += weighted
            sums[LANES + lane] += weighted * values[column, lane]
            sums[2 * LANES + lane] += weighted * level[column, lane]


@compiled
def best_multiple(values: Floats, weights: Floats, zero: Floats | None, work: Work, scale: Floats) -> None:
    """`scale`: the weighted least-squares one for values near scale * (level - zero), levels in `work`.

    `work.error` is its error counted from that of all zeros, so it is never positive.
    """
    level, sums, error = work.level, work.sums, work.error
    fill(sums, ZERO)
    for column in range(len(values)):
        weight = weights[column]
        for lane in range(LANES):
            whole = level[column, lane] if zero is None else level[column, lane] - zero[lane]
            weighted = whole * weight
            sums[lane] += weighted * values[column, lane]
            sums[LANES + lane] += weighted * whole
    for lane in range(LANES):
        found = sums[lane] * inverse(sums[LANES + lane])
        error[lane] = -sums[lane] * found
        scale[lane] = found


@compiled
def value_moments(values: Floats, weights: Floats, moments: Floats) -> None:
    """`moments` (2, LANES): the weighted sums of the values and of their squares."""
    fill(moments[0], ZERO)
    fill(moments[1], ZERO)
    for column in range(len(values)):
        weight = weights[column]
        for lane in range(LANES):
            weighted = values[column, lane] * weight
            moments[0, lane] += weighted
            moments[1, lane] += weighted * values[column, lane]


@compiled
def keep_better(error: Floats, least: Floats, parts: Floats, best: Floats) -> None:
    """Where the error is less than the least so far, that and the best parts, (n, LANES), are replaced."""
    for row in range(len(parts)):
        for lane in range(LANES):
            new, old = parts[row, lane], best[row, lane]
            best[row, lane] = new if error[lane] < least[lane] else old
    for lane in range(LANES):
        new, old = error[lane], least[lane]
        least[lane] = new if new < old else old
