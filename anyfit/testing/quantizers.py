"""Conformance of any quantizer: what the pipeline relies on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from anyfit.calibration.statistics import InputStatistics
from anyfit.core.units import Weight
from anyfit.formats import formats
from anyfit.formats.base import Format
from anyfit.quantizers import quantizers
from anyfit.quantizers.base import Quantizer, output_errors
from anyfit.tuning.coded import Stored


def check_quantizer(quantizer: Quantizer, formats: Sequence[Format]) -> None:
    """Raises AssertionError where the quantizer breaks its contract on one of `formats`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 512, generator=generator) * torch.randn(512, generator=generator).exp()
    x[:, 5] = 0
    weight = torch.randn(12, 512, generator=generator) * 0.1
    weight[3] = 0
    for statistics in (InputStatistics(x.T @ x / 600, 600), InputStatistics.unknown(512)):
        kept_weight, kept_hessian = weight.clone(), statistics.hessian.clone()
        prepared = quantizer.prepare(statistics)
        for format_ in formats:
            encoded = quantizer.encode(weight, prepared, format_)
            assert encoded.data.dtype == torch.uint8, "variants are bytes"
            assert encoded.data.shape == (format_.data_rows((12, 512)), format_.row_bytes(512)), "as many bytes as the format says"
            values = format_.decode(encoded.data)
            assert values.isfinite().all(), "finite weights stay finite"
            error = float(output_errors(weight - values, statistics.hessian).sum())
            assert abs(error - encoded.error) <= 1e-5 * error + 1e-12, "the error is that of the stored bytes"
            again = quantizer.encode(weight, quantizer.prepare(statistics), format_)
            assert torch.equal(again.data, encoded.data), "the same in, the same out"
            if format_.whole:
                continue
            rows = quantizer.encode(weight[4:9].contiguous(), prepared, format_)
            assert torch.equal(rows.data, encoded.data[4:9]), "a row doesn't depend on its neighbours"
        assert torch.equal(weight, kept_weight) and torch.equal(statistics.hessian, kept_hessian), "inputs are not changed"


@torch.no_grad()
def rounded(weight: Weight, name: str, values: Tensor, order: Tensor | None = None) -> Stored:
    """A matrix as it is stored in a format by plain rounding. `values` (outputs, inputs), rows in stored order."""
    quantizer, format_ = quantizers.get("rtn"), formats.get(name)
    prepared = quantizer.prepare(InputStatistics.unknown(values.shape[1]))
    return Stored(weight, format_, quantizer.encode(values.detach(), prepared, format_).data, order)
