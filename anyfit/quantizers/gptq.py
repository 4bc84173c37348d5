"""GPTQ in any format's own grid.

Paper: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323,
section 3 and algorithm 1. Columns are rounded one after another; each column's error is made good by the
columns that are still free, through the Cholesky factor of the inverse of H = mean of x xᵀ.

Differences from the paper, and why:

* The grid is the file format's, two-level scales and codebooks included. Scales of a span of 256 columns
  are fitted when the span begins, from the weights as corrected so far, and as they are stored. So what is
  optimised is what the file holds, to the bit.
* Each column's error in that fit counts with 1 / U_jj², what rounding it costs after compensation, instead
  of alike.
* Columns are taken by falling mean square (the code base's act-order), but within their span, and spans by
  their largest: storage order and groups stay as they are, and one order serves every format.
* Damping starts at 1 % of the mean diagonal and doubles until the factorisation succeeds; more than the
  start is noted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.calibration.statistics import InputStatistics
from anyfit.formats.base import SPAN, CastFormat, Format, GridFormat, Scales, join, nearest
from anyfit.quantizers.base import Encoded, Quantizer, output_error

DAMPING = 0.01
CHUNK = 32
"""Columns corrected one by one before their errors are applied to the rest as one matrix product."""


@dataclass(frozen=True)
class Factorised:
    """What every format of every matrix with this input shares.

    `order` (columns,): the column at each step; spans stay together. `factor` (columns, columns): U, upper
    triangular in that order, H⁻¹ = Uᵀ U. `importance` (columns,): 1 / U_jj² by column.
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
        importance = torch.empty_like(diagonal)
        importance[order] = factor.diagonal().pow(-2).float()
        importance[dead] = 0
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
        error = output_error(weight - format_.decode(data), prepared.statistics.hessian)
        return Encoded(data, error, prepared.notes)


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


def solve(format_: GridFormat, weight: Tensor, prepared: Factorised) -> tuple[Tensor, Scales]:
    """Codes (rows, columns) uint8 and the scales of all spans, both in storage order."""
    order, factor = prepared.order, prepared.factor
    # Columns are rows here, so that each step reads and writes consecutive memory.
    free = weight.T[order].contiguous()
    free[prepared.dead[order]] = 0
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    scales: dict[int, Scales] = {}
    start = 0
    while start < len(order):
        first = int(order[start]) // SPAN * SPAN
        end = start + min(SPAN, len(order) - first)
        local = order[start:end] - first
        stored_order = torch.empty(len(local), weight.shape[0])
        stored_order[local] = free[start:end]
        fitted = format_.fit(stored_order.T.contiguous(), prepared.importance[first : first + len(local)])
        group = local // format_.group
        grid = fitted.scale.T[group].contiguous(), fitted.offset.T[group].contiguous()
        codes[:, order[start:end]] = _round_span(format_, free, factor, start, end, grid).T
        scales[first] = fitted
        start = end
    return codes, join([scales[first] for first in sorted(scales)])


def _round_span(format_: GridFormat, free: Tensor, factor: Tensor, start: int, end: int, grid: tuple[Tensor, Tensor]) -> Tensor:
    """Round columns `start` to `end` of `free` in turn and push their errors onto the later ones, in place.

    `grid`: scale and offset, (end - start, rows). Returns the codes, (end - start, rows).
    """
    scale, offset = grid
    inverse = torch.where(scale == 0, 0, 1 / scale)
    codes = torch.empty(scale.shape, dtype=torch.uint8)
    for begin in range(start, end, CHUNK):
        stop = min(begin + CHUNK, end)
        errors = torch.empty(stop - begin, free.shape[1])
        for j in range(begin, stop):
            at = j - start
            column = free[j]
            codes[at] = nearest(format_.levels, format_.uniform, (column + offset[at]) * inverse[at])
            value = format_.levels[codes[at].long()] * scale[at] - offset[at]
            errors[j - begin] = (column - value) / factor[j, j]
            free[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j - begin], alpha=-1)
        free[stop:].addmm_(factor[begin:stop, stop:].T, errors, alpha=-1)
    return codes


QUANTIZER = GPTQ()
