"""GPTQ and rounding against independent computations."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from anyfit.calibration.statistics import InputStatistics
from anyfit.formats import formats
from anyfit.formats.base import SPAN, GridFormat, Scales
from anyfit.quantizers import gptq as gptq_module
from anyfit.quantizers import quantizers
from anyfit.quantizers.base import output_errors
from anyfit.quantizers.gptq import Factor, column_order, factor_lower, inverse_factor, invert_lower
from anyfit.testing.quantizers import check_quantizer

GRIDS = ("Q2_K", "Q4_K", "Q6_K", "Q4_0", "Q5_1", "IQ4_NL", "MXFP4", "int3_asym", "int4_sym")


def correlated(columns: int, seed: int = 0, count: int = 2048) -> InputStatistics:
    """Inputs with log-normal channel scales and strong correlations."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(count, columns, generator=generator) @ mixing * torch.randn(columns, generator=generator).exp()
    return InputStatistics(x.T @ x / count, count)


def matrix(rows: int, columns: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def grid(name: str) -> GridFormat:
    format_ = formats.get(name)
    assert isinstance(format_, GridFormat)
    return format_


@pytest.mark.parametrize("name", quantizers)
def test_conformance(name: str) -> None:
    names = ("Q2_K", "Q4_K", "Q8_0", "MXFP4", "int3_asym", "table3", "aqlm_2x8g8", "BF16", "int8_static")
    check_quantizer(quantizers.get(name), [formats.get(f) for f in names])


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_without_correlations_is_rounding(name: str) -> None:
    """A diagonal H leaves nothing to compensate with, and each column weighs what its mean square says."""
    weight = matrix(24, 512)
    diagonal = torch.rand(512, generator=torch.Generator().manual_seed(3)) + 0.5
    statistics = InputStatistics(diagonal.diag(), 100)
    gptq, rtn = quantizers.get("gptq"), quantizers.get("rtn")
    prepared = gptq.prepare(statistics)
    damped = InputStatistics(prepared.importance.diag(), 100)
    ours = gptq.encode(weight, prepared, grid(name)).data
    plain = rtn.encode(weight, damped, grid(name)).data
    assert torch.equal(ours, plain)


def plain_span(format_: GridFormat, free: Tensor, factor: Factor, scales: Scales) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, values and weights as they were rounded, (rows, columns) in the factor's order: one span, vector by vector."""
    group, codes = factor.order // format_.group, torch.empty(free.shape, dtype=torch.uint8)
    scale, offset = scales.scale[:, group], scales.offset[:, group]
    free, values = free.clone(), torch.empty_like(free)
    for now in torch.arange(free.shape[1]).split(format_.vector):
        upper = factor.upper[now][:, now]
        passed = torch.linalg.inv(upper)
        target = (free[:, now] + offset[:, now]) * torch.where(scale[:, now] == 0, 0, 1 / scale[:, now])
        codes[:, now] = format_.codes(target.T, passed @ passed.T).T
        values[:, now] = format_.levels[codes[:, now].int()] * scale[:, now] - offset[:, now]
        later = slice(int(now[-1]) + 1, None)
        free[:, later] -= (free[:, now] - values[:, now]) @ passed @ factor.upper[now, later]
    return codes, values, free


@pytest.mark.parametrize("name", ["Q4_K", "Q8_0", "IQ4_NL", "MXFP4", "IQ2_XS", "IQ3_S"])
def test_the_compiled_loop_rounds_as_a_plain_one(name: str) -> None:
    format_ = grid(name)
    weight, prepared = matrix(300, 256), quantizers.get("gptq").prepare(correlated(256))
    weight[7] = 0
    factor = prepared.factor(format_.vector)
    scales = format_.fit(weight, prepared.importance)
    ordered = weight[:, factor.order]
    expected = plain_span(format_, ordered, factor, scales)
    free, codes = ordered.T.contiguous(), torch.empty(256, 300, dtype=torch.uint8)
    errors = torch.zeros(300, dtype=torch.float64)
    (span,) = factor.spans
    gptq_module._round_span(format_, (ordered.T.contiguous(), free, codes, errors), factor, span, scales)
    # float32 may tip a rounding, and with it the rest of the row
    same = (expected[0] == codes.T).all(1)
    assert same.float().mean() > 0.8 and (expected[0] == codes.T).float().mean() > 0.9
    assert torch.allclose(free.T[same], expected[2][same], atol=1e-5)
    hessian = prepared.statistics.hessian[factor.order][:, factor.order]
    plain = output_errors(ordered - expected[1], hessian)
    assert torch.allclose(errors[same], plain[same], rtol=1e-3, atol=1e-6)
    assert float(errors.sum()) == pytest.approx(float(plain.sum()), rel=0.01)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "Q2_K", "IQ4_XS", "IQ3_S"])
def test_the_error_that_is_told_is_that_of_the_decoded_bytes(name: str) -> None:
    """Known from the rounding itself, without multiplying by the moments; also where inputs were always zero."""
    weight, statistics, gptq, format_ = matrix(40, 512), correlated(512), quantizers.get("gptq"), grid(name)
    statistics.hessian[[5, 300]], statistics.hessian[:, [5, 300]] = 0, 0
    found = gptq.encode(weight, gptq.prepare(statistics), format_)
    assert torch.allclose(found.errors, output_errors(weight - format_.decode(found.data), statistics.hessian), rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("name", ["Q3_K", "IQ4_NL", "IQ2_XXS", "IQ3_S"])
def test_the_number_of_threads_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gptq, format_ = matrix(400, 512), quantizers.get("gptq"), grid(name)
    prepared = gptq.prepare(correlated(512))
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr("numba.config.NUMBA_NUM_THREADS", threads)
        found.append(gptq.encode(weight, prepared, format_).data)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_further_passes_leave_no_row_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, statistics, format_ = matrix(64, 512), correlated(512), grid("Q2_K")
    gptq = quantizers.get("gptq")
    prepared = gptq.prepare(statistics)

    def row_errors() -> Tensor:
        difference = weight - format_.decode(gptq.encode(weight, prepared, format_).data)
        return ((difference @ statistics.hessian) * difference).sum(1)

    several = row_errors()
    monkeypatch.setattr(gptq_module, "COARSE_PASSES", 1)
    once = row_errors()
    assert (several <= once * 1.0001).all() and several.sum() < once.sum()


def test_matches_the_textbook_column_loop() -> None:
    """The paper's algorithm 1, written naively in float64 with the inverse updated by elimination."""
    weight, statistics, format_ = matrix(8, 256), correlated(256), grid("Q8_0")
    gptq = quantizers.get("gptq")
    prepared = gptq.prepare(statistics)
    scales = format_.fit(weight, prepared.importance)
    group = torch.arange(256) // format_.group
    scale, offset = scales.scale[:, group].double(), scales.offset[:, group].double()
    hessian = statistics.hessian.double()
    hessian += gptq_module.DAMPING * hessian.diagonal().mean() * torch.eye(256, dtype=torch.float64)
    inverse, free, expected = torch.linalg.inv(hessian), weight.double().clone(), torch.empty(8, 256, dtype=torch.float64)
    for j in column_order(statistics.diagonal).tolist():
        code = ((free[:, j] + offset[:, j]) / scale[:, j]).round().clamp(format_.levels.min(), format_.levels.max())
        expected[:, j] = code * scale[:, j] - offset[:, j]
        free -= torch.outer((free[:, j] - expected[:, j]) / inverse[j, j], inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    found = format_.decode(gptq.encode(weight, prepared, format_).data)
    same = (found - expected.float()).abs() < 1e-6
    assert same.float().mean() > 0.97, "float32 may tip a rounding, and what follows it, but not many"


@pytest.mark.parametrize("name", GRIDS)
def test_compensation_pays_on_correlated_inputs(name: str) -> None:
    weight, statistics = matrix(64, 512), correlated(512)
    gptq, rtn = quantizers.get("gptq"), quantizers.get("rtn")
    ours = gptq.encode(weight, gptq.prepare(statistics), grid(name)).error
    plain = rtn.encode(weight, rtn.prepare(statistics), grid(name)).error
    assert ours < plain / 1.5


def test_error_is_the_mean_squared_output_error() -> None:
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    difference = matrix(10, 64)
    expected = (x @ difference.T).square().mean(0)
    assert torch.allclose(output_errors(difference, x.T @ x / 500).float(), expected, rtol=1e-4)


def test_factor_inverts_the_damped_hessian() -> None:
    hessian = correlated(64).hessian.double()
    factor, added, notes = inverse_factor(hessian, torch.arange(64))
    assert torch.allclose(added.double(), torch.full((64,), gptq_module.DAMPING * float(hessian.diagonal().mean()), dtype=torch.float64))
    damped = hessian + gptq_module.DAMPING * hessian.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    assert torch.allclose(factor.T.double() @ factor.double() @ damped, torch.eye(64, dtype=torch.float64), atol=1e-5)
    assert not notes and torch.equal(factor, factor.triu())


def test_a_matrix_is_factored_in_its_place() -> None:
    hessian = correlated(1200).hessian.double() + 0.1 * torch.eye(1200)
    found = hessian.clone()
    assert factor_lower(found)
    assert torch.allclose(found, torch.linalg.cholesky(hessian), rtol=1e-9, atol=1e-12)
    hessian[700, 700] = -1
    assert not factor_lower(hessian)


def test_a_triangular_matrix_is_inverted_in_its_place() -> None:
    lower = torch.randn(1200, 1200, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril() / 30
    lower.diagonal().fill_(1)
    found = lower.clone()
    invert_lower(found)
    assert torch.allclose(found @ lower, torch.eye(1200, dtype=torch.float64), atol=1e-8) and torch.equal(found, found.tril())


def test_damping_escalates_and_says_so() -> None:
    hessian = torch.eye(32, dtype=torch.float64)
    hessian[0, 1] = hessian[1, 0] = 1.2
    factor, _, notes = inverse_factor(hessian, torch.arange(32))
    assert factor.isfinite().all() and "damping raised to" in notes[0]


def test_dead_inputs_are_zeroed_and_noted() -> None:
    statistics = correlated(256)
    dead = torch.tensor([3, 77])
    hessian = statistics.hessian.clone()
    hessian[dead], hessian[:, dead] = 0, 0
    gptq = quantizers.get("gptq")
    encoded = gptq.encode(matrix(8, 256), gptq.prepare(InputStatistics(hessian, 10)), grid("Q8_0"))
    assert (grid("Q8_0").decode(encoded.data)[:, dead] == 0).all()
    assert any("2 of 256 inputs" in note for note in encoded.notes)


def test_order_stays_inside_spans() -> None:
    order = column_order(torch.rand(600, generator=torch.Generator().manual_seed(0)))
    assert sorted(order.tolist()) == list(range(600))
    spans = [int(c) // SPAN for c in order]
    assert sum(a != b for a, b in itertools.pairwise(spans)) == 2
