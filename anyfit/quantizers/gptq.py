"""GPTQ in any format's own grid.

Paper: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
section 3 and algorithm 1. Columns are rounded one after another; each column's error is made good by the
columns that are still free, through the Cholesky factor of the inverse of H = mean of x xᵀ.

Differences from the paper, and why:

* The grid is the file format's, two-level scales and codebooks included. Scales of a span of 256 columns
  are fitted when the span begins, from the weights as corrected so far, and as they are stored. So what is
  optimised is what the file holds, to the bit.
* In that fit, column j counts with the geometric mean of H_jj and 1 / U_jj²: what rounding it costs without
  and with compensation. Either alone does worse on real networks.
* On coarse grids (fewer than four bits) the columns drift far from the weights that the scales were fitted
  to. There the whole solution is repeated with scales fitted to the values that the last pass really
  rounded, and each row keeps its best pass.
* Columns are taken by falling mean square (the code base's act-order), but within their span, and spans by
  their largest: storage order and groups stay as they are, and one order serves every scalar format.
* Formats that code several columns as one entry of a codebook round these together, and their errors are
  passed on together, through the factor's diagonal blocks (as QuIP#'s block LDLQ, arXiv 2402.04396, does with
  its own codebook). The entry is chosen in the metric that the block's errors then cost.
* Codebooks of rows or of a matrix (`anyfit.formats.table`, `anyfit.formats.aqlm`) are no grids that are known before they are fitted. Those
  of rows choose their codes by themselves, and nothing is made good; those of a matrix are fitted as AQLM does (`aqlm`).
* Damping starts at 5 % of the mean diagonal (1 % in the paper; more is safer in coarse grids, whose range
  compensation must not leave) and doubles until the factorisation succeeds; more than the start is noted.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from anyfit.calibration.statistics import DAMPING, InputStatistics
from anyfit.devices import CPU
from anyfit.formats.aqlm import AdditiveFormat
from anyfit.formats.base import SPAN, Format, GridFormat, Scales, join
from anyfit.formats.choose import Levels
from anyfit.formats.threads import each
from anyfit.quantizers import aqlm
from anyfit.quantizers.base import Encoded, Quantizer
from anyfit.quantizers.gptq_span import LANES, VECTOR_ROWS, Grid, Order, Rows, round_lanes, round_rows
from anyfit.quantizers.rtn import encode_nearest

_COLUMNS_AT_ONCE = 512
_ROUNDED_TOGETHER = 64
"""Columns of a span, before their errors are pushed onto the rest of it by a matrix product."""
_ROWS_ALIKE = 16
"""A matrix of a multiple of so many rows is multiplied in whole tiles: what is left over would be summed up in another order."""
COARSE_BITS, COARSE_PASSES = 4, 3
"""Formats of fewer bits a weight are solved so many times."""


@dataclass(frozen=True)
class Factor:
    """`order` (columns,): the column at each step; spans and vectors stay together. `upper` (columns, columns): U, upper
    triangular in that order, (H + diag(damping))⁻¹ = Uᵀ U with `damping` (columns,). `passed` (vectors, vector, vector): the
    inverses of U's diagonal blocks; an error e of a vector is made good by the later columns as far as it can, e @ passed is
    what is passed on, and its square is what remains."""

    order: Tensor
    upper: Tensor
    damping: Tensor
    passed: Tensor

    @property
    def device(self) -> torch.device:
        return self.upper.device

    @cached_property
    def spans(self) -> tuple[_Span, ...]:
        """In the order of rounding."""
        found, start, order = [], 0, self.order.tolist()
        while start < len(order):
            first = order[start] // SPAN * SPAN
            end = start + min(SPAN, len(order) - first)
            steps = [slice(now, min(now + _ROUNDED_TOGETHER, end)) for now in range(start, end, _ROUNDED_TOGETHER)]
            found.append(_Span(first, slice(start, end), self.order[start:end].argsort(), tuple((now, self._of(now)) for now in steps)))
            start = end
        return tuple(found)

    def _of(self, now: slice) -> Order[Tensor]:
        vector = self.passed.shape[-1]
        passed = self.passed[now.start // vector : now.stop // vector]
        parts = self.upper[now, now], passed, passed @ passed.mT, self.damping[now], self.order[now] % SPAN
        return Order(*(part.contiguous() for part in parts))

    def to(self, device: torch.device) -> Factor:
        return Factor(*(part.to(device) for part in (self.order, self.upper, self.damping, self.passed)))


@dataclass(frozen=True)
class _Span:
    """Columns that share scales: the `first` of them in storage order, their `place` in the order of rounding, the `storage` order among
    them, and those that are rounded together."""

    first: int
    place: slice
    storage: Tensor
    steps: tuple[tuple[slice, Order[Tensor]], ...]


@dataclass(frozen=True)
class Factorised:
    """What every format of every matrix with this input shares.

    `factors` by the number of columns that are coded together; made when first asked for. `importance` (columns,): what
    each column counts in a fit of scales. `dead` (columns,): inputs that were always zero. Both are where scales are fitted, in
    the machine's own memory.
    """

    statistics: InputStatistics
    factors: dict[int, Factor]
    importance: Tensor
    dead: Tensor
    notes: tuple[str, ...]

    lock: Lock = field(default_factory=Lock, repr=False)

    def factor(self, vector: int) -> Factor:
        """For formats that code `vector` columns together: where the moments are, but for codebooks, whose entries processors choose."""
        with self.lock:
            if vector not in self.factors:
                self.factors[vector] = factorise(self.statistics, vector)[0].to(CPU)
            return self.factors[vector]


class GPTQ(Quantizer):
    name = "gptq"

    def prepare(self, statistics: InputStatistics, formats: Iterable[Format] = ()) -> Factorised:
        diagonal = statistics.diagonal
        if not statistics.count:  # nothing is made good
            return Factorised(statistics, {}, torch.ones_like(diagonal), diagonal == 0, ())
        factor, notes = factorise(statistics, 1)
        compensated = torch.empty_like(diagonal)
        compensated[factor.order] = factor.upper.diagonal().pow(-2)
        dead = diagonal == 0
        if dead.any():
            notes = (*notes, f"{int(dead.sum())} of {len(dead)} inputs were always zero; their weights are set to zero")
        prepared = Factorised(statistics, {1: factor}, (diagonal * compensated).sqrt().cpu(), dead.cpu(), notes)
        for vector in sorted({format_.vector for format_ in formats if isinstance(format_, GridFormat)}):
            prepared.factor(vector)
        return prepared

    def encode(self, weight: Tensor, prepared: Factorised, format_: Format) -> Encoded:
        if isinstance(format_, GridFormat) and prepared.statistics.count:
            padded = functional.pad(weight, (0, 0, 0, -len(weight) % _ROWS_ALIKE))
            codes, scales, errors = solve(format_, padded, prepared)
            return Encoded(format_.pack(codes.cpu(), scales), errors.cpu(), prepared.notes).rows(slice(len(weight)))
        weight = weight.cpu()
        if isinstance(format_, AdditiveFormat):
            data = aqlm.encode(format_, weight.masked_fill(prepared.dead, 0), prepared.statistics.hessian)
        else:  # a table that is only looked up, where no column can make good another's error, or a format without a grid
            data = encode_nearest(format_, weight, prepared.statistics.diagonal.cpu())
        return Encoded(data, self.errors(weight - format_.decode(data), prepared), prepared.notes)

    def statistics(self, prepared: Factorised) -> InputStatistics:
        return prepared.statistics


def factorise(statistics: InputStatistics, vector: int) -> tuple[Factor, tuple[str, ...]]:
    """The order of the columns and the factor for it, and a note where it took more damping than usual."""
    order = column_order(statistics.diagonal, vector)
    upper, damping, notes = inverse_factor(statistics.hessian, order)
    blocks = upper.unflatten(0, (-1, vector)).unflatten(2, (-1, vector)).diagonal(dim1=0, dim2=2).movedim(2, 0)
    passed = torch.linalg.solve_triangular(blocks, torch.eye(vector, device=blocks.device).expand_as(blocks), upper=True)
    return Factor(order, upper, damping, passed), notes


def column_order(diagonal: Tensor, vector: int = 1) -> Tensor:
    """Vectors of columns by falling mean square inside each span, spans by their largest; ties in storage order."""
    tops = diagonal.unflatten(0, (-1, vector)).amax(1)
    spans = tops.split(SPAN // vector)
    by_span = [SPAN // vector * i + span.argsort(descending=True, stable=True) for i, span in enumerate(spans)]
    largest = torch.stack([span.max() for span in spans])
    ordered = torch.cat([by_span[i] for i in largest.argsort(descending=True, stable=True)])
    return (ordered[:, None] * vector + torch.arange(vector, device=ordered.device)).flatten()


def inverse_factor(hessian: Tensor, order: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Upper U, float32, with (H + diag(damping))⁻¹ = Uᵀ U for the columns in `order`, the damping (columns,), and a note where it
    took more than usual. Where a column's inputs were always zero, it is one more.

    With the columns reversed H = L Lᵀ, and U is L⁻¹ with rows and columns reversed. L is computed in float64; beside `hessian`
    (columns, columns) and the result only one such square of float64 is held.
    """
    diagonal, backwards = hessian.diagonal()[order], order.flip(0)
    dead = diagonal.flip(0) == 0
    mean = diagonal.where(diagonal != 0, 1).double().mean()
    damping = DAMPING
    some = range(0, len(hessian), _COLUMNS_AT_ONCE)
    lower = torch.empty(hessian.shape, dtype=torch.float64, device=hessian.device)
    while True:
        for start in some:
            rows = slice(start, start + _COLUMNS_AT_ONCE)
            lower[rows] = hessian[backwards[rows]][:, backwards]
        lower.diagonal()[dead] = 1
        lower.diagonal().add_(damping * mean)
        if factor_lower(lower):
            break
        damping *= 2
        assert damping < 1e6, "no damping makes the second moments positive definite: they are not finite"
    lower = lower.float()
    invert_lower(lower)  # a triangle's condition is the root of its square's: float32 is enough from here
    notes = (f"damping raised to {damping:.0%} of the mean diagonal",) if damping > DAMPING else ()
    added = damping * mean + (diagonal == 0).double()
    return lower.flip(0, 1), added.float(), notes


def factor_lower(matrix: Tensor) -> bool:
    """Put L of a symmetric matrix, L Lᵀ, in its place, some columns at a time; False where it isn't positive definite."""
    size = len(matrix)
    for start in range(0, size, _COLUMNS_AT_ONCE):
        end = min(start + _COLUMNS_AT_ONCE, size)
        corner, failed = torch.linalg.cholesky_ex(matrix[start:end, start:end])
        if failed or not corner.sum().isfinite():
            return False
        matrix[start:end, start:end] = corner
        below = torch.linalg.solve_triangular(corner.mT, matrix[end:, start:end], upper=True, left=False)
        matrix[end:, start:end] = below
        for first in range(end, size, _COLUMNS_AT_ONCE):
            rest = below[first - end :]
            matrix[first:, first : first + _COLUMNS_AT_ONCE].addmm_(rest, rest[:_COLUMNS_AT_ONCE].mT, alpha=-1)
    matrix.tril_()
    return True


def invert_lower(matrix: Tensor) -> None:
    """Put the inverse of a lower triangular matrix in its place, half by half."""
    size = len(matrix)
    if size <= _COLUMNS_AT_ONCE:
        matrix.copy_(torch.linalg.solve_triangular(matrix, torch.eye(size, dtype=matrix.dtype, device=matrix.device), upper=False))
        return
    first, last = slice(size // 2), slice(size // 2, size)
    below = torch.linalg.solve_triangular(matrix[last, last], matrix[last, first], upper=False)
    matrix[last, first] = -torch.linalg.solve_triangular(matrix[first, first], below, upper=False, left=False)
    invert_lower(matrix[first, first])
    invert_lower(matrix[last, last])


@dataclass(frozen=True)
class Solution:
    """One pass over a matrix: `scales` in storage order; `codes` uint8, and the weights that were `rounded` to them, (columns, rows) in
    the factor's order; `errors` (rows,) float64."""

    codes: Tensor
    scales: Scales
    rounded: Tensor
    errors: Tensor

    def with_better_rows(self, other: Solution) -> Solution:
        """This solution, with the rows of `other` whose errors are smaller."""
        better = other.errors < self.errors

        def pick(own: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(better.to(own.device)[:, None], theirs, own)

        scales = Scales(
            scale=pick(self.scales.scale, other.scales.scale),
            offset=pick(self.scales.offset, other.scales.offset),
            stored={key: pick(own, other.scales.stored[key]) for key, own in self.scales.stored.items()},
        )
        codes = torch.where(better, other.codes, self.codes)
        return Solution(codes, scales, other.rounded, torch.minimum(self.errors, other.errors))


def solve(format_: GridFormat, weight: Tensor, prepared: Factorised) -> tuple[Tensor, Scales, Tensor]:
    """Codes (rows, columns) uint8, the scales of all spans, both in storage order, and the errors, (rows,)."""
    factor = prepared.factor(format_.vector)
    ordered = weight.to(factor.device).T.contiguous()[factor.order]
    ordered[prepared.dead.to(factor.device)[factor.order]] = 0
    best = _pass(format_, ordered, factor, prepared.importance, None)
    for _ in range(COARSE_PASSES - 1 if format_.bits < COARSE_BITS else 0):
        best = best.with_better_rows(_pass(format_, ordered, factor, prepared.importance, best.rounded))
    return best.codes[factor.order.argsort()].T.contiguous(), best.scales, best.errors


def _pass(format_: GridFormat, ordered: Tensor, factor: Factor, importance: Tensor, model: Tensor | None) -> Solution:
    """Round every column once. `ordered` (columns, rows): the weights in the factor's order. Scales are fitted to `model`, in the
    same order, or to the weights as they come."""
    free, codes = ordered.clone(), torch.empty(ordered.shape, dtype=torch.uint8, device=ordered.device)
    errors = torch.zeros(ordered.shape[1], dtype=torch.float64, device=ordered.device)
    scales: dict[int, Scales] = {}
    for span in factor.spans:
        fitted_to = (free if model is None else model)[span.place][span.storage].T.contiguous().cpu()
        fitted = format_.fit(fitted_to, importance[span.first : span.first + len(span.storage)])
        _round_span(format_, (ordered, free, codes, errors), factor, span, fitted)
        scales[span.first] = fitted
    return Solution(codes, join([scales[first] for first in sorted(scales)]), free, errors.clamp_min(0))


def _round_span(format_: GridFormat, columns: tuple[Tensor, Tensor, Tensor, Tensor], factor: Factor, span: _Span, scales: Scales) -> None:
    """Round the columns of a span in turn and push their errors onto the later ones, in place.

    `columns`: weights, free weights and codes, (columns, rows) each, and what the errors cost, (rows,) float64. The free weights of a
    column stay as they were when it was rounded.
    """
    inverse = torch.where(scales.scale == 0, 0, 1 / scales.scale)
    ordered, free, codes, errors = columns
    by_group = torch.stack([scales.scale.T, inverse.T, scales.offset.T]).to(free.device)
    grid = Grid(levels_on(format_, free.device), format_.group, *by_group)
    start, stop = span.place.start, span.place.stop
    pushed = torch.empty(stop - start, free.shape[1], device=free.device)
    for now, order in span.steps:
        own = pushed[now.start - start : now.stop - start]
        round_columns(format_, Rows(ordered[now], free[now], codes[now], own, errors), order, grid)
        free[now.stop : stop].addmm_(factor.upper[now, now.stop : stop].T, own, alpha=-1)
    free[stop:].addmm_(factor.upper[span.place, stop:].T, pushed, alpha=-1)


@cache
def levels_on(format_: GridFormat, device: torch.device) -> Tensor:
    return format_.levels.to(device)


def round_columns(format_: GridFormat, columns: Rows[Tensor], order: Order[Tensor], grid: Grid[Tensor]) -> None:
    """Round a few columns in turn, their errors made good among them. `columns` and `grid` are transposed: rows lie side by side.

    An error costs e (H + diag(damping)) eᵀ, which is the sum of squares of what is passed on; the damping's part is taken off.
    """
    if columns.free.device.type == "cuda":
        from anyfit.quantizers.gptq_cuda import round_lanes as round_on_cuda

        round_on_cuda(format_, order, grid, columns)
        return
    shared, num_rows = Order(*_arrays(order)), columns.free.shape[1]
    if isinstance(format_.book, Levels):
        scales, rows = Grid(*_arrays(grid)), Rows(*_arrays(columns))
        each(lambda part: round_lanes(format_.book, shared, scales, rows, part.start, part.stop), num_rows, LANES)
        return
    own = [part.T.contiguous() for part in columns[:-1]]
    levels, group, *by_row = grid

    def some(rows: slice) -> None:
        scales = Grid(levels.numpy(), group, *_arrays([part.T[rows] for part in by_row]))
        round_rows(format_.book, shared, scales, Rows(*(part[rows].numpy() for part in (*own, columns.errors))))

    each(some, num_rows, VECTOR_ROWS)
    for part, rounded in zip(columns[1:], own[1:], strict=False):
        part.copy_(rounded.T)


def _arrays(parts: Iterable[Any]) -> list[Any]:
    """Tensors as arrays, which share their memory; whatever else as it is."""
    return [part.contiguous().numpy() if isinstance(part, Tensor) else part for part in parts]


QUANTIZER = GPTQ()
