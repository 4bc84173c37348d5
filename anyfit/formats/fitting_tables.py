"""Codebooks of rows: exact k-means of a row's weights, and its clusters split in two again and again.

Paper: "Any-Precision LLM", arXiv 2402.10517, section 3.2 (seed model and incremental upscaling). In one dimension clusters are
runs of the sorted weights, so the best ones of the seed are found by dynamic programming (as in SqueezeLLM, arXiv 2306.07629); a
further bit cuts each run where the weighted squared error falls most. What is cut stays cut: a code of few bits is the upper bits
of a code of many.

Differences from the paper, and why:

* Sizes begin with 2 bits, below the seed of 3: two neighbours of the seed are one cluster there. That is up to a tenth more squared error
  than the best four clusters have; a seed of 2 would cost three bits as much, and all finer ones more.
* A weight counts with the mean square of its input, not with its own squared gradient. Were gradients of the outputs independent
  of the inputs, the two would differ by a factor for each row, and rows have codebooks of their own.
* A cut is searched among all places. The paper's code takes the first one at which both halves hold what is nearest to them, which
  isn't always the best.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anyfit.formats.fitting import CHUNK, error_weights
from anyfit.formats.fitting_lanes import Floats, compiled
from anyfit.formats.threads import each

LOWEST, SEED = 2, 3
"""Bits of the first table, and of the codes that are found together. Finer ones are made by splitting, coarser ones by joining."""
_ROWS_ALONE = 16
"""Rows that are worth a thread of their own."""

Doubles = NDArray[np.float64]


def entries(bits: int) -> int:
    """Entries of all tables from the first to that of so many bits."""
    return sum(2**size for size in range(LOWEST, bits + 1))


def fit_tables(weight: Tensor, importance: Tensor, bits: int, seed: int = SEED) -> tuple[Tensor, Tensor]:
    """Codes uint8 (rows, columns) of so many bits, and float16 (rows, `entries`): the tables of all sizes up to that, one after another.

    `weight` (rows, columns) float32, of at least 2^seed columns; `importance` (columns,): what each column's squared error counts. The
    code of fewer bits is the code's upper bits. A cluster with nothing to split leaves its entry to both halves.
    """
    assert min(seed, bits) >= LOWEST and max(seed, bits) <= 8 and weight.shape[1] >= 2**seed, (weight.shape, seed, bits)
    counted = error_weights(importance).double().numpy()
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    tables = torch.empty(len(weight), entries(bits), dtype=torch.float64)

    def some(rows: slice) -> None:
        values, order = weight[rows].detach().sort(dim=1, stable=True)
        _cluster(values.numpy(), order.numpy(), counted, seed, bits, codes[rows].numpy(), tables[rows].numpy())

    most = max(1, CHUNK // weight.shape[1])
    each(some, len(weight), min(_ROWS_ALONE, most), most)
    return codes, tables.half()


@compiled
def _cluster(values: Floats, order: NDArray[Any], counted: Doubles, seed: int, bits: int, codes: NDArray[Any], tables: Doubles) -> None:
    """`values` (rows, columns), sorted, stood at the places `order` (rows, columns); see `fit_tables`."""
    columns = values.shape[1]
    borders = np.empty(2 ** max(bits, seed) + 1, np.int64)
    weights, sums, masses = np.empty(columns), np.zeros(columns + 1), np.zeros(columns + 1)
    best, cuts = np.empty((2**seed, columns + 1)), np.empty((2**seed, columns + 1), np.int64)
    for row in range(len(values)):
        sorted_, entry = values[row], tables[row]
        for place in range(columns):
            weights[place] = counted[order[row, place]]
        middle = _mean(sorted_, weights, 0, columns)
        for place in range(columns):  # around the mean, so that little is lost when sums are subtracted
            sums[place + 1] = sums[place] + weights[place] * (np.float64(sorted_[place]) - middle)
            masses[place + 1] = masses[place] + weights[place]
        _best_runs(sums, masses, best, cuts, borders[: 2**seed + 1])
        parents, children = 0, 0
        for size in range(LOWEST, min(seed, bits) + 1):
            joined = 2 ** (seed - size)
            parents, children = children, children + 2**size
            for run in range(2**size):
                entry[parents + run] = _mean(sorted_, weights, borders[run * joined], borders[(run + 1) * joined])
        for size in range(seed, bits):
            for run in range(2**size - 1, -1, -1):  # backwards, as each run's borders are written to twice its place
                first, last, whole = borders[run], borders[run + 1], entry[parents + run]
                cut = _best_cut(sorted_, weights, first, last)
                borders[2 * run], borders[2 * run + 1], borders[2 * run + 2] = first, cut, last
                entry[children + 2 * run] = _mean(sorted_, weights, first, cut) if first < cut else whole
                entry[children + 2 * run + 1] = _mean(sorted_, weights, cut, last) if cut < last else whole
            parents, children = children, children + 2 ** (size + 1)
        for run in range(2**bits + 1):
            borders[run] = borders[run * 2 ** max(0, seed - bits)]
        for run in range(2**bits):
            for place in range(borders[run], borders[run + 1]):
                codes[row, order[row, place]] = run


@compiled
def _best_runs(sums: Doubles, masses: Doubles, best: Doubles, cuts: NDArray[Any], borders: NDArray[Any]) -> None:
    """Write to `borders` (runs + 1,) where the runs of least error begin and end.

    `sums` and `masses` (places + 1,): of the first so many places, weighted values and weights. The least error has the largest sum of
    (sum of a run)² / (its mass). `best[r, e]` is the largest for the first e places in r + 1 runs, `cuts[r, e]` where the last of these
    begins. The more places, the later it begins: so half of the places are known from the other half, within few steps each.
    """
    places, runs = len(sums) - 1, len(borders) - 1
    for end in range(1, places + 1):
        best[0, end] = sums[end] * sums[end] / masses[end]
    for run in range(1, runs):
        cuts[run, 0] = run
        stride = 1
        while 2 * stride <= places:
            stride *= 2
        while stride > 0:
            for end in range(stride, places + 1, 2 * stride):
                lowest, highest = max(run, cuts[run, end - stride]), end - 1
                if end + stride <= places:
                    highest = min(highest, cuts[run, end + stride])
                found, cut = -np.inf, run
                for first in range(lowest, highest + 1):
                    total = sums[end] - sums[first]
                    gained = best[run - 1, first] + total * total / (masses[end] - masses[first])
                    if gained > found:
                        found, cut = gained, first
                best[run, end], cuts[run, end] = found, cut
            stride //= 2
    borders[0], borders[runs] = 0, places
    for run in range(runs - 1, 0, -1):
        borders[run] = cuts[run, borders[run + 1]]


@compiled
def _best_cut(values: Floats, weights: Doubles, first: int, last: int) -> int:
    """Where the second of the two runs of least error begins; `last` where all values are the same."""
    middle, mass = _mean(values, weights, first, last), 0.0
    for place in range(first, last):
        mass += weights[place]
    total, below, most, cut = 0.0, 0.0, 0.0, last
    for place in range(first, last - 1):
        total += weights[place] * (np.float64(values[place]) - middle)
        below += weights[place]
        gained = total * total / (below * (mass - below))
        if gained > most:
            most, cut = gained, place + 1
    return cut


@compiled
def _mean(values: Floats, weights: Doubles, first: int, last: int) -> float:
    """Weighted; of equal values that very value, and 0 of none."""
    if first >= last:
        return 0.0
    start = np.float64(values[first])
    total, mass = 0.0, 0.0
    for place in range(first, last):
        total += weights[place] * (np.float64(values[place]) - start)
        mass += weights[place]
    return start + total / mass
