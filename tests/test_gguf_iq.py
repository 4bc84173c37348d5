"""Codebook formats: choices against brute force, fits against exhaustive search and libggml, bits against the gguf package."""

from __future__ import annotations

from itertools import product

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from anyfit.formats import formats, gguf_iq_fit
from anyfit.formats.base import GridFormat, Scales, quantize
from anyfit.formats.gguf_iq import CodebookFormat, even_signs
from anyfit.formats.gguf_iq_choose import add_lines

NAMES = ("IQ3_S", "IQ3_XXS", "IQ2_S", "IQ2_XS", "IQ2_XXS")


def book(name: str) -> CodebookFormat:
    format_ = formats.get(name)
    assert isinstance(format_, CodebookFormat)
    return format_


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def a_metric(seed: int, samples: int) -> Tensor:
    """Second moments of correlated inputs, the more correlated the fewer samples."""
    inputs = torch.randn(8, samples, generator=generator(seed)) * torch.rand(8, 1, generator=generator(seed)).add(0.3)
    return inputs @ inputs.T / samples + 0.05 * torch.eye(8)


def combinations(format_: CodebookFormat) -> Tensor:
    """Every pattern of signs that can be stored, (patterns, 8)."""
    signs = torch.tensor(list(product((1.0, -1.0), repeat=8)))
    return signs[signs.prod(1) > 0] if format_.even else signs


def errors(difference: Tensor, metric: Tensor) -> Tensor:
    """(8, rows) to (rows,)."""
    return (difference * (metric @ difference)).sum(0)


def best_errors(format_: CodebookFormat, target: Tensor, metric: Tensor) -> Tensor:
    """By trying all that can be stored; for codebooks of 8 columns."""
    entries = torch.from_numpy(format_.entries)
    constant = errors(target, metric)
    best = torch.full((target.shape[1],), torch.inf)
    for signs in combinations(format_):
        values = entries * signs[:, None]
        best = torch.minimum(best, (errors(values, metric) - 2 * target.T @ metric @ values).amin(1))
    return best + constant


@pytest.mark.parametrize("name", NAMES)
def test_what_is_chosen_can_be_stored(name: str) -> None:
    format_ = book(name)
    target = torch.randn(8, 500, generator=generator(0)) * format_.levels.max() * 0.6
    values = format_.levels[format_.codes(target, a_metric(0, 12)).int()]
    size = len(format_.entries)
    known = {tuple(entry) for entry in format_.entries.T.tolist()}
    assert all(tuple(part.tolist()) in known for row in values.abs().T for part in row.split(size))
    assert not format_.even or (values < 0).sum(0).remainder(2).eq(0).all()


@pytest.mark.parametrize(("samples", "slack"), [(400, 1.03), (12, 1.12)])
@pytest.mark.parametrize("name", ["IQ2_XXS", "IQ2_XS"])
def test_choices_come_near_the_best_of_all(name: str, samples: int, slack: float) -> None:
    format_ = book(name)
    target = torch.randn(8, 60, generator=generator(1)) * 18
    for seed in range(2):
        metric = a_metric(seed, samples)
        found = errors(target - format_.levels[format_.codes(target, metric).int()], metric)
        best = best_errors(format_, target, metric)
        assert (found > best * (1 - 1e-4)).all()
        assert found.sum() < slack * best.sum()


@pytest.mark.parametrize("name", NAMES)
def test_correlations_count(name: str) -> None:
    """Judged by the metric, choosing by all of it beats choosing by its diagonal."""
    format_ = book(name)
    target = torch.randn(8, 300, generator=generator(2)) * format_.levels.max() * 0.4
    metric = a_metric(3, 12)

    def error(by: Tensor) -> float:
        return errors(target - format_.levels[format_.codes(target, by).int()], metric).sum().item()

    assert error(metric) < 0.9 * error(metric.diagonal().diag())


@pytest.mark.parametrize("name", NAMES)
def test_one_group_is_fitted_as_by_an_exhaustive_search(name: str) -> None:
    """With one group that isn't zero, its scale is free, so it must be the best of a fine ladder."""
    format_ = book(name)
    weight = torch.zeros(4, 256)
    weight[:, : format_.group] = torch.randn(4, format_.group, generator=generator(4)) * 0.02
    importance = torch.randn(256, generator=generator(5)).exp()
    importance[format_.group :] = 0
    ours = weighted_error(format_, weight, importance, format_.fit(weight, importance).scale)
    best = torch.full((4,), torch.inf)
    reach = weight.abs().amax(1, keepdim=True) / format_.levels.max()
    for step in range(160):
        scale = (reach * 1.03 ** (step - 40)).expand(4, 256 // format_.group)
        best = torch.minimum(best, weighted_error(format_, weight, importance, scale))
    assert ours.sum() < 1.03 * best.sum()


def weighted_error(format_: GridFormat, weight: Tensor, importance: Tensor, scale: Tensor) -> Tensor:
    spread = scale.repeat_interleave(format_.group, 1)
    _, values = quantize(format_, weight, spread, torch.zeros_like(spread), importance)
    return ((values - weight).square() * importance).sum(1)


@pytest.mark.parametrize("name", NAMES)
def test_the_lines_that_are_lowest_somewhere_are_found(name: str) -> None:
    """Against trying all entries at many scales."""
    format_, along, rng = book(name), np.empty(book(name).entries.shape[1], np.float32), np.random.default_rng(0)
    parts = gguf_iq_fit.parts_of(rng.random(256, np.float32), format_.entries)
    work, lines = gguf_iq_fit.new_work(len(along)), np.empty((3, len(parts.squares), gguf_iq_fit.LINES))
    for part in range(8):
        add_lines(parts.entries[part], rng.random(8, np.float32), 0, along)
        likely = float(10.0 ** rng.uniform(-5, 1))
        gguf_iq_fit._envelope(along, parts.squares, part, likely, lines, work)
        last = lines[2, part].tolist().index(np.inf)
        for inverse in np.geomspace(1e-2, 1 / (likely * gguf_iq_fit.SCALES[-1]), 200):
            line = int((lines[2, part, :last] < inverse).sum())
            found = lines[1, part, line] - 2 * inverse * lines[0, part, line]
            least = (parts.squares[part] - 2 * inverse * along.astype(np.float64)).min()
            assert found <= least + 1e-3 * abs(least) + 1e-3 * parts.squares[part, 0]


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_put_together_from_what_is_stored(name: str) -> None:
    format_ = book(name)
    fitted = format_.fit(torch.randn(3, 256, generator=generator(6)), torch.ones(256))
    again = format_.assemble(fitted.stored)
    assert torch.equal(again.scale, fitted.scale) and not again.offset.any()
    doubled = format_.assemble(fitted.stored | {"d": fitted.stored["d"] * 2})
    assert torch.equal(doubled.scale, fitted.scale * 2)
    two = format_.assemble({key: torch.cat([part, part], 1) for key, part in fitted.stored.items()})
    assert torch.equal(two.scale, torch.cat([fitted.scale, fitted.scale], 1))


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_and_every_sign_comes_back(name: str) -> None:
    """A row of all entries with signs that count up, against the gguf package, and codes as they were."""
    format_ = book(name)
    num, size = format_.entry_codes.shape
    vectors = num * size // 8
    signs = even_signs()[torch.arange(vectors) % 128] if format_.even else (torch.arange(vectors) % 256).to(torch.uint8)
    negative = (signs[:, None] >> torch.arange(8)) & 1
    codes = format_.entry_codes.reshape(1, -1) + (negative * format_.num_magnitudes).reshape(1, -1).to(torch.uint8)
    blocks = codes.shape[1] // 256
    numbers = (torch.arange(blocks * 256 // format_.group) % 16).to(torch.uint8)[None]
    scales = format_.assemble({"d": torch.full((1, blocks), 0.37).half(), "numbers": numbers})
    data = format_.pack(codes, scales)
    assert torch.equal(format_.read(data)[0], codes)
    read = gguf.quants.dequantize(data.numpy(), gguf.GGMLQuantizationType[name])
    values = format_.levels[codes.int()] * scales.scale.repeat_interleave(format_.group, 1)
    assert np.array_equal(read, values.numpy())


def test_what_the_codebook_lacks_is_our_mistake() -> None:
    format_ = book("IQ2_XXS")
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, :8] = 2
    scales: Scales = format_.fit(torch.ones(1, 256), torch.ones(256))
    with pytest.raises(AssertionError, match="IQ2_XXS can't store"):
        format_.pack(codes, scales)
