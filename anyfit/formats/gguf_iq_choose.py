"""Which entry of a codebook, with which signs, stands for a vector of weights: compiled loops.

The error of a difference e is e @ metric @ e. For given signs it is a quadratic form in the entry's magnitudes, so the
sums over an entry's products of magnitudes are looked up and all entries are compared exactly; then signs are flipped
as long as that helps, and the entries searched again. That is within a few thousandths of the best over all signs on
metrics of real networks; judging by the metric's diagonal alone costs 2 to 3 % (40 % on strongly correlated ones).
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from anyfit.formats.fitting_lanes import Floats, compiled

WIDTH = 8
"""Columns that share a byte of signs."""
_ROUNDS = 4


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def choose(target: Floats, metric: Floats, entries: Floats, products: Floats, even: bool) -> tuple[NDArray[np.int16], NDArray[np.uint8]]:
    """Entries (parts, rows) and negative signs (WIDTH, rows) of the combinations nearest to `target` (WIDTH, rows).

    `entries` (size, num): the magnitudes of the codebook; WIDTH / size of them, the parts, make a vector. `products`
    (pairs, num): those of two magnitudes i < j. `even`: the number of negative signs must be even.
    """
    size, num = entries.shape
    parts, rows = WIDTH // size, target.shape[1]
    chosen, negative = np.zeros((parts, rows), np.int16), np.zeros((WIDTH, rows), np.uint8)
    own = np.zeros((parts, num), np.float32)
    for column in range(WIDTH):
        for k in range(num):
            own[column // size, k] += metric[column, column] * entries[column % size, k] ** 2
    sign, error, magnitude, cost = np.empty(WIDTH, np.float32), np.empty(WIDTH), np.empty(WIDTH, np.float32), np.empty(num, np.float32)
    for row in range(rows):
        wanted = target[:, row]
        _first_signs(wanted, metric, even, sign)
        error[:] = 0
        for _ in range(_ROUNDS):
            # Each part is chosen in the light of the others' errors; the first knows those only afterwards.
            for part in list(range(parts)) + list(range(parts - 1)):
                first = part * size
                error[first : first + size] = wanted[first : first + size]
                best = _nearest_entry(metric, entries, products, own[part], sign, error, first, cost)
                chosen[part, row] = best
                for i in range(size):
                    magnitude[first + i] = entries[i, best]
                    error[first + i] -= sign[first + i] * entries[i, best]
            if not _flip(metric, even, sign, error, magnitude):
                break
        for column in range(WIDTH):
            negative[column, row] = sign[column] < 0
    return chosen, negative


@compiled
def _first_signs(target: Floats, metric: Floats, even: bool, sign: Floats) -> None:
    """Those of the target; where their number must be even and isn't, the least important is another."""
    odd, least = False, 0
    for column in range(WIDTH):
        negative = target[column] < 0
        sign[column] = -1 if negative else 1
        odd ^= negative
        if abs(target[column]) * metric[column, column] < abs(target[least]) * metric[least, least]:
            least = column
    if even and odd:
        sign[least] = -sign[least]


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def _nearest_entry(
    metric: Floats, entries: Floats, products: Floats, own: Floats, sign: Floats, error: NDArray[np.float64], first: int, cost: Floats
) -> int:
    """The entry of least error for the columns from `first`, where `error` holds their target, elsewhere what is left."""
    size, num = entries.shape
    cost[:] = own
    for i in range(size):
        along = 0.0
        for j in range(WIDTH):
            along += metric[first + i, j] * error[j]
        factor, values = np.float32(-2 * sign[first + i] * along), entries[i]
        for k in range(num):
            cost[k] += factor * values[k]
    pair = 0
    for i in range(size):
        for j in range(i + 1, size):
            factor, values = np.float32(2 * sign[first + i] * sign[first + j] * metric[first + i, first + j]), products[pair]
            pair += 1
            for k in range(num):
                cost[k] += factor * values[k]
    return first_least(cost)


@njit(nogil=True, cache=True, error_model="numpy", fastmath={"nnan", "nsz"})
def first_least(numbers: Floats) -> int:
    """Where the least of them first stands, their number being a multiple of 32.

    The minimum of a run is vectorised, which an argmin isn't.
    """
    least, run = numbers[0], 0
    for start in range(0, len(numbers), 32):
        candidate = numbers[start]
        for k in range(start, start + 32):
            candidate = numbers[k] if numbers[k] < candidate else candidate
        if candidate < least:
            least, run = candidate, start
    for k in range(run, run + 32):
        if numbers[k] == least:
            return k
    return run


@compiled
def _flip(metric: Floats, even: bool, sign: Floats, error: NDArray[np.float64], magnitude: Floats) -> bool:
    """Flip signs, or pairs of signs, as long as the error falls, at most WIDTH times. Whether any was."""
    change = np.empty(WIDTH)
    for flips in range(WIDTH):
        for i in range(WIDTH):
            along = 0.0
            for j in range(WIDTH):
                along += metric[i, j] * error[j]
            change[i] = 4 * magnitude[i] * (sign[i] * along + magnitude[i] * metric[i, i])
        least, best, other = -1e-6 * metric[0, 0], -1, -1
        for i in range(WIDTH):
            if not even and change[i] < least:
                least, best = change[i], i
            for j in range(i if even else 0):
                both = change[i] + change[j] + 8 * sign[i] * sign[j] * magnitude[i] * magnitude[j] * metric[i, j]
                if both < least:
                    least, best, other = both, i, j
        if best < 0:
            return flips > 0
        for flipped in (best, other):
            if flipped >= 0:
                error[flipped] += 2 * sign[flipped] * magnitude[flipped]
                sign[flipped] = -sign[flipped]
    return True
