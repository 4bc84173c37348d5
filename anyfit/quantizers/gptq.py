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
* On coarse grids (eight levels or fewer) the columns drift far from the weights that the scales were fitted
  to. There the whole solution is repeated with scales fitted to the values that the last pass really
  rounded, and each row keeps its best pass.
* Columns are taken by falling mean square (the code base's act-order), but within their span, and spans by
  their largest: storage order and groups stay as they are, and one order serves every format.
* Damping starts at 5 % of the mean diagonal (1 % in the paper; more is safer in coarse grids, whose range
  compensation must not leave) and doubles until the factorisation succeeds; more than the start is noted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.calibration.statistics import InputStatistics
from anyfit.formats.base import SPAN, CastFormat, Format, GridFormat, Scales, join, nearest
from anyfit.quantizers.base import Encoded, Quantizer, output_errors

DAMPING = 0.05
COARSE_LEVELS, COARSE_PASSES = 8, 3
"""Grids of at most so many levels are solved so many times."""
CHUNK = 32
"""Columns corrected one by one before their errors are applied to the rest as one matrix product."""


@dataclass(frozen=True)
class Factorised:
    """What every format of every matrix with this input shares.

    `order` (columns,): the column at each step; spans stay together. `factor` (columns, columns): U, upper
    triangular in that order, H⁻¹ = Uᵀ U. `importance` (columns,): what each column counts in a fit of scales.
    """

    statistics: InputStatistics
    order: Tensor
    factor: Tensor
    importance: Tensor
    dead: Tensor
    notes: tuple[str, ...]


class GPTQ(Quantizer):
    name = "gptq"

    def prepare(self, statistics: InputStatistics) -> Factorised:
        diagonal = statistics.diagonal
        dead = diagonal == 0
        hessian = statistics.hessian.double().clone()
        hessian.diagonal()[dead] = 1
        order = column_order(diagonal)
        factor, notes = inverse_factor(hessian[order][:, order])
        compensated = torch.empty_like(diagonal)
        compensated[order] = factor.diagonal().pow(-2).float()
        importance = (diagonal * compensated).sqrt()
        if dead.any():
            notes = (*notes, f"{int(dead.sum())} of {len(dead)} inputs were always zero; their weights are set to zero")
        return Factorised(statistics, order, factor.float(), importance, dead, notes)

    def encode(self, weight: Tensor, prepared: Factorised, format_: Format) -> Encoded:
        if isinstance(format_, CastFormat):
            data = format_.encode(weight)
        else:
            assert isinstance(format_, GridFormat)
            codes, scales = solve(format_, weight, prepared)
            data = format_.pack(codes, scales)
        errors = output_errors(weight - format_.decode(data), prepared.statistics.hessian)
        return Encoded(data, errors, prepared.notes)


def column_order(diagonal: Tensor) -> Tensor:
    """Columns by falling mean square inside each span, spans by their largest; ties in storage order."""
    spans = diagonal.split(SPAN)
    tops = torch.stack([span.max() for span in spans])
    by_span = [SPAN * i + span.argsort(descending=True, stable=True) for i, span in enumerate(spans)]
    return torch.cat([by_span[i] for i in tops.argsort(descending=True, stable=True)])


def inverse_factor(hessian: Tensor) -> tuple[Tensor, tuple[str, ...]]:
    """Upper U with (H + damping)⁻¹ = Uᵀ U, float64, and a note where it took more damping than usual."""
    mean = hessian.diagonal().mean()
    damping = DAMPING
    while True:
        damped = hessian + damping * mean * torch.eye(len(hessian), dtype=hessian.dtype)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed and upper.isfinite().all():
                break
        damping *= 2
        assert damping < 1e6, "no damping makes the second moments positive definite: they are not finite"
    notes = (f"damping raised to {damping:.0%} of the mean diagonal",) if damping > DAMPING else ()
    return upper, notes


@dataclass(frozen=True)
class Solution:
    """One pass over a matrix, in storage order: codes, scales and values, and the values before rounding."""

    codes: Tensor
    scales: Scales
    values: Tensor
    rounded: Tensor

    def with_rows(self, better: Tensor, other: Solution) -> Solution:
        """This solution, with the rows `better` (rows,) bool of `other`."""

        def pick(own: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(better[:, None], theirs, own)

        scales = Scales(
            scale=pick(self.scales.scale, other.scales.scale),
            offset=pick(self.scales.offset, other.scales.offset),
            stored={key: pick(own, other.scales.stored[key]) for key, own in self.scales.stored.items()},
        )
        values, rounded = pick(self.values, other.values), pick(self.rounded, other.rounded)
        return Solution(pick(self.codes, other.codes), scales, values, rounded)


def solve(format_: GridFormat, weight: Tensor, prepared: Factorised) -> tuple[Tensor, Scales]:
    """Codes (rows, columns) uint8 and the scales of all spans, both in storage order."""
    hessian = prepared.statistics.hessian
    best = latest = _pass(format_, weight, prepared, None)
    if len(format_.levels) <= COARSE_LEVELS:
        error = output_errors(weight - best.values, hessian)
        for _ in range(COARSE_PASSES - 1):
            latest = _pass(format_, weight, prepared, latest.rounded)
            new_error = output_errors(weight - latest.values, hessian)
            best = best.with_rows(new_error < error, latest)
            error = torch.minimum(error, new_error)
    return best.codes, best.scales


def _pass(format_: GridFormat, weight: Tensor, prepared: Factorised, model: Tensor | None) -> Solution:
    """Round every column once. Scales are fitted to `model` (rows, columns), or to the weights as they come."""
    order, factor = prepared.order, prepared.factor
    # Columns are rows here, so that each step reads and writes consecutive memory.
    free = weight.T[order].contiguous()
    free[prepared.dead[order]] = 0
    codes, values = torch.empty(free.shape, dtype=torch.uint8), torch.empty_like(free)
    scales: dict[int, Scales] = {}
    start = 0
    while start < len(order):
        first = int(order[start]) // SPAN * SPAN
        end = start + min(SPAN, len(order) - first)
        local = order[start:end] - first
        if model is None:
            stored_order = torch.empty(len(local), weight.shape[0])
            stored_order[local] = free[start:end]
            fitted_to = stored_order.T.contiguous()
        else:
            fitted_to = model[:, first : first + len(local)].contiguous()
        fitted = format_.fit(fitted_to, prepared.importance[first : first + len(local)])
        group = local // format_.group
        grid = fitted.scale.T[group].contiguous(), fitted.offset.T[group].contiguous()
        _round_span(format_, (free, codes, values), factor, (start, end), grid)
        scales[first] = fitted
        start = end
    storage = order.argsort()
    joined = join([scales[first] for first in sorted(scales)])
    return Solution(codes[storage].T, joined, values[storage].T, free[storage].T)


def _round_span(
    format_: GridFormat, columns: tuple[Tensor, Tensor, Tensor], factor: Tensor, span: tuple[int, int], grid: tuple[Tensor, Tensor]
) -> None:
    """Round the columns of a span in turn and push their errors onto the later ones, in place.

    `columns`: free weights, codes and values, (columns, rows) each; the free weights of a column stay as they
    were when it was rounded. `grid`: scale and offset, (columns of the span, rows).
    """
    (free, codes, values), (start, end), (scale, offset) = columns, span, grid
    inverse = torch.where(scale == 0, 0, 1 / scale)
    for begin in range(start, end, CHUNK):
        stop = min(begin + CHUNK, end)
        errors = torch.empty(stop - begin, free.shape[1])
        for j in range(begin, stop):
            at = j - start
            codes[j] = nearest(format_.levels, format_.uniform, (free[j] + offset[at]) * inverse[at])
            values[j] = format_.levels[codes[j].long()] * scale[at] - offset[at]
            errors[j - begin] = (free[j] - values[j]) / factor[j, j]
            free[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - begin], alpha=-1)
        free[stop:].addmm_(factor[begin:stop, stop:].T, errors, alpha=-1)


QUANTIZER = GPTQ()
