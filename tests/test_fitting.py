"""The compiled searches for scales: rounding as torch does it, and what is found against exhaustive searches."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from anyfit.formats import formats
from anyfit.formats.base import GridFormat, Scales, quantize
from anyfit.formats.fitting import Columns, fit_rows, listed, whole
from anyfit.formats.fitting_lanes import HALF_MAX, HALF_TINY, LANES, Floats, new_work, round_to_levels, squared_error, to_half
from anyfit.formats.fitting_scale import ScaleSearch

ROOT = Path(__file__).parents[1]
FITTED = ("int2_sym", "int4_sym_g128", "int3_asym", "Q4_0", "Q4_1", "IQ4_NL", "MXFP4", "TQ2_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K")


def test_halves_are_rounded_as_by_torch() -> None:
    bits = torch.arange(0x7C00, dtype=torch.int16)
    halves = bits.view(torch.float16).float()
    middles = (halves[1:] + halves[:-1]) / 2
    numbers = torch.cat([halves, middles, *(torch.nextafter(middles, torch.tensor(to)) for to in (torch.inf, -torch.inf))])
    numbers = torch.cat([numbers, -numbers, torch.tensor([65519.0, 65520.0, 1e30, 1e-30, -1e-45])])
    expected = numbers.clamp(-HALF_MAX.item(), HALF_MAX.item()).half().float()
    expected = torch.where((expected == 0) & (numbers != 0), numbers.sign() * HALF_TINY.item(), expected)
    got = torch.tensor([to_half(number) for number in numbers.numpy()])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", ["IQ4_NL", "MXFP4"])
def test_numbers_are_rounded_to_the_nearest_of_uneven_levels(name: str) -> None:
    levels = grid(name).levels.numpy()
    values = np.linspace(-150, 150, 40 * LANES, dtype=np.float32).reshape(40, LANES)
    work, ones = new_work(40), np.ones(LANES, np.float32)
    round_to_levels(values, ones, None, listed(torch.from_numpy(levels)).compiled, work)
    assert np.isin(work.level, levels).all()
    assert np.array_equal(np.abs(work.level - values), np.abs(values[..., None] - levels).min(-1))


def test_the_error_is_that_of_plain_rounding() -> None:
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal((32, LANES), np.float32), rng.random(32, np.float32)
    scale, offset = rng.random(LANES, np.float32) - np.float32(0.5), rng.random(LANES, np.float32)
    work = new_work(32)
    squared_error(values, weights, scale, offset, whole(-3, 4).compiled, work)
    rounded = np.clip(np.rint((values + offset) / scale), -3, 4) * scale - offset
    expected = (weights[:, None] * (rounded - values).astype(np.float64) ** 2).sum(0)
    assert np.allclose(work.error, expected, rtol=1e-4)


@pytest.mark.parametrize("rows", [1, LANES - 1, LANES, LANES + 1])
def test_rows_are_given_back_in_order(rows: int) -> None:
    weight = torch.arange(rows * 64, dtype=torch.float32).view(rows, 64)

    def first_of_each_group(columns: Columns) -> tuple[Floats]:
        return (columns.values[:, :, 0].transpose(1, 0, 2).reshape(2, -1),)

    (got,) = fit_rows(first_of_each_group, weight, torch.ones(64), 32)
    assert torch.equal(got, weight[:, ::32])


def test_a_scale_found_comes_near_the_best_of_thousands() -> None:
    weight, importance = sample(20, 16), weights(16)
    (found,) = fit_rows(ScaleSearch.integers(3).half, weight, importance, 16)
    steps = torch.linspace(-0.5, 0.5, 4001)[:, None, None] * weight.abs().amax(1, keepdim=True)
    tried = (weight / steps).nan_to_num().round().clamp(-4, 3) * steps
    best = (importance * (tried - weight).square()).sum(-1).amin(0)
    got = (weight / found).round().clamp(-4, 3) * found
    assert (importance * (got - weight).square()).sum() <= 1.02 * best.sum()


@pytest.mark.parametrize("name", ["Q3_K", "Q6_K", "Q4_K", "Q2_K"])
def test_no_neighbour_of_a_number_is_better(name: str) -> None:
    """Moving the numbers by one, in those groups where that is better, takes nothing off the error."""
    format_, weight, importance = grid(name), sample(24, 256), weights(256)
    fitted = format_.fit(weight, importance)
    least = group_errors(format_, weight, importance, fitted)
    for key, step in product(fitted.stored.keys() & {"scales", "numbers", "others"}, (1, -1)):
        bounds = format_.second  # type: ignore[attr-defined]
        numbers = (fitted.stored[key].int() + step).clamp(bounds.low if key != "others" else 0, bounds.high)
        moved = format_.assemble({**fitted.stored, key: numbers.to(fitted.stored[key].dtype)})
        better = torch.minimum(least, group_errors(format_, weight, importance, moved))
        assert better.sum() >= (1 - 1e-5) * least.sum(), (key, step)


def test_another_process_finds_the_same() -> None:
    program = "from tests.test_fitting import fitted_bytes; import sys; sys.stdout.write(fitted_bytes())"
    other = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout == fitted_bytes()


def test_threads_find_the_same() -> None:
    """The compiled searches run at once in several threads, each with memory of its own."""
    expected = fitted_bytes()
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: fitted_bytes(), range(4))) == {expected}


def test_padding_and_the_other_rows_change_nothing() -> None:
    weight, importance = sample(2 * LANES + 3, 256), weights(256)
    for name in FITTED:
        whole_matrix = grid(name).fit(weight, importance)
        for first, last in ((0, 1), (LANES - 2, LANES + 2), (LANES, 2 * LANES + 3)):
            rows = grid(name).fit(weight[first:last], importance)
            for key, part in rows.stored.items():
                assert torch.equal(part, whole_matrix.stored[key][first:last]), (name, key)


def fitted_bytes() -> str:
    """A digest of all that some formats store for some weights."""
    digest = hashlib.sha256()
    for name in FITTED:
        for part in grid(name).fit(sample(70, 256), weights(256)).stored.values():
            digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def grid(name: str) -> GridFormat:
    format_ = formats.get(name)
    assert isinstance(format_, GridFormat)
    return format_


def group_errors(format_: GridFormat, weight: Tensor, importance: Tensor, scales: Scales) -> Tensor:
    """Weighted squared error of plain rounding, (rows, groups)."""
    group = torch.arange(weight.shape[1]) // format_.group
    _, values = quantize(format_, weight, scales.scale[:, group], scales.offset[:, group])
    return (importance * (values - weight).square()).unflatten(1, (-1, format_.group)).sum(-1)


def sample(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(11)) * 0.02


def weights(columns: int) -> Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(12)).exp()


def test_compiled_without_a_place_to_keep_it(tmp_path: Path) -> None:
    """As in a container that is read-only: every process compiles anew."""
    code = (
        "import numba.core.caching as c; c.CacheImpl._locator_classes = [];"
        "import torch; from anyfit.formats import formats; from anyfit.quantizers.rtn import encode_nearest;"
        "f = formats.get('Q8_0'); w = torch.ones(1, 32); print(f.decode(encode_nearest(f, w, torch.ones(32))).sum())"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "31.99" in run.stdout
