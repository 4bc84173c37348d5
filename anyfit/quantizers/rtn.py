"""Rounding to the nearest, with scales that minimise the error weighted by the inputs' mean squares.

This is what llama.cpp does with an importance matrix: only the diagonal of the second moments is used, and
each weight is rounded by itself. Codebooks, of rows or of a matrix, are found with the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from anyfit.calibration.statistics import InputStatistics
from anyfit.formats.aqlm import AdditiveFormat
from anyfit.formats.base import SPAN, CastFormat, Format, GridFormat, join, quantize
from anyfit.formats.table import TableFormat
from anyfit.formats.w8a8 import RoundedFormat
from anyfit.quantizers import aqlm
from anyfit.quantizers.base import Encoded, Quantizer


class RoundToNearest(Quantizer):
    name = "rtn"

    def prepare(self, statistics: InputStatistics, formats: Iterable[Format] = ()) -> InputStatistics:
        return statistics

    def encode(self, weight: Tensor, prepared: InputStatistics, format_: Format) -> Encoded:
        weight = weight.cpu()
        data = encode_nearest(format_, weight, prepared.diagonal.cpu())
        return Encoded(data, self.errors(weight - format_.decode(data), prepared))

    def statistics(self, prepared: InputStatistics) -> InputStatistics:
        return prepared


def encode_nearest(format_: Format, weight: Tensor, importance: Tensor) -> Tensor:
    """The file's bytes of `weight` (rows, columns), each value rounded to its nearest code, or codes found with their codebooks.

    `importance` (columns,): what each column's squared error counts.
    """
    if isinstance(format_, CastFormat):
        return format_.encode(weight)
    if isinstance(format_, (TableFormat, RoundedFormat)):
        return format_.encode(weight, importance)
    if isinstance(format_, AdditiveFormat):
        return aqlm.encode(format_, weight, importance.diag())
    assert isinstance(format_, GridFormat)
    codes, scales = [], []
    for start in range(0, weight.shape[1], SPAN):
        part = weight[:, start : start + SPAN]
        counted = importance[start : start + SPAN]
        fitted = format_.fit(part, counted)
        group = torch.arange(part.shape[1]) // format_.group
        codes.append(quantize(format_, part, fitted.scale[:, group], fitted.offset[:, group], counted)[0])
        scales.append(fitted)
    return format_.pack(torch.cat(codes, 1), join(scales))


QUANTIZER = RoundToNearest()
