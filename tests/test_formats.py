"""Formats: the conformance suite, the bytes against other readers, the fits against other quantisers and brute force."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from anyfit.core.errors import UserError
from anyfit.formats import GGUF_GRIDS, fitting, formats
from anyfit.formats.base import Format, GridFormat, nearest
from anyfit.formats.fields import pack_dense, pack_fields, unpack_dense, unpack_fields
from anyfit.formats.integer import IntegerFormat
from anyfit.quantizers.rtn import encode_nearest
from anyfit.testing.formats import CHECKS, check_format

INTEGERS = tuple(name for name in formats if isinstance(formats.get(name), IntegerFormat))
NAIVE_IN_GGUF = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4", "TQ2_0")
WEIGHTS = ("normal", "laplace", "outliers")


@pytest.mark.parametrize("name", formats)
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_conformance(name: str, check: Callable[[Format], None]) -> None:
    check(formats.get(name))


def test_the_suite_notices_what_is_wrong() -> None:
    class Swapped(type(formats.get("Q4_0"))):  # type: ignore[misc]
        def pack(self, codes: Tensor, scales: Any) -> Tensor:
            return super().pack(codes.flip(1), scales)

    good = formats.get("Q4_0")
    bad = Swapped(good.name, good.levels, good.layout, good.search)  # type: ignore[attr-defined]
    with pytest.raises(AssertionError, match="differ from those chosen"):
        check_format(bad)


@pytest.mark.parametrize("name", ["Q8_0", "Q5_1", "Q2_K", "Q6_K", "MXFP4", "int3_asym"])
def test_how_many_rows_are_fitted_at_a_time_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, weights = sample("laplace", 70, 256), importance(256)
    expected = encode_nearest(grid(name), weight, weights)
    monkeypatch.setattr(fitting, "CHUNK", 9 * 256)
    assert torch.equal(encode_nearest(grid(name), weight, weights), expected)


@pytest.mark.parametrize("name", GGUF_GRIDS)
def test_the_gguf_package_reads_the_same(name: str) -> None:
    format_ = grid(name)
    data = encode_nearest(format_, sample("outliers", 40, 512), importance(512))
    assert_same_bits(format_.decode(data), gguf_values(name, data))


@pytest.mark.parametrize("name", GGUF_GRIDS)
def test_any_bytes_are_read_as_by_the_gguf_package(name: str) -> None:
    data = any_bytes(name)
    assert_same_bits(grid(name).decode(data), gguf_values(name, data))


@pytest.mark.parametrize("name", GGUF_GRIDS)
def test_libggml_reads_the_same(name: str, libggml: ctypes.CDLL) -> None:
    for data in (any_bytes(name), encode_nearest(grid(name), sample("laplace", 8, 512), importance(512))):
        got = grid(name).decode(data)
        expected = np.empty(got.shape, np.float32)
        rows = np.ascontiguousarray(data.numpy())
        function = getattr(libggml, "dequantize_row_" + ggml_name(name))
        function.restype = None
        function(ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(expected.ctypes.data), ctypes.c_int64(expected.size))
        assert_same_bits(got, torch.from_numpy(expected))


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", NAIVE_IN_GGUF)
def test_fits_beat_least_and_largest(name: str, kind: str) -> None:
    weight, weights = sample(kind, 64, 512), importance(512)
    naive = gguf.quants.quantize(weight.numpy(), getattr(gguf.GGMLQuantizationType, name))
    ours = encode_nearest(grid(name), weight, weights)
    assert weighted_error(name, ours, weight) < weighted_error(name, torch.from_numpy(naive), weight)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("name", GGUF_GRIDS)
def test_fits_are_no_worse_than_libggml_with_an_importance_matrix(name: str, kind: str, libggml: ctypes.CDLL) -> None:
    weight, weights = sample(kind, 96, 512), importance(512)
    ours = encode_nearest(grid(name), weight, weights)
    rivals = torch.empty_like(ours)
    type_ = ctypes.c_int(int(getattr(gguf.GGMLQuantizationType, name)))
    matrix, rows, columns = np.ascontiguousarray(weight.numpy()), ctypes.c_int64(96), ctypes.c_int64(512)
    imatrix, out = ctypes.c_void_p(weights.numpy().ctypes.data), ctypes.c_void_p(rivals.data_ptr())
    libggml.ggml_quantize_chunk(type_, ctypes.c_void_p(matrix.ctypes.data), out, ctypes.c_int64(0), rows, columns, imatrix)
    assert weighted_error(name, ours, weight) <= weighted_error(name, rivals, weight)


@pytest.mark.parametrize("name", ["int2_sym", "int4_sym", "int3_asym"])
def test_fits_come_near_an_exhaustive_search(name: str) -> None:
    format_ = grid(name)
    assert isinstance(format_, IntegerFormat)
    weight, weights = sample("laplace", 12, 32), importance(32)
    top = 2**format_.num_bits - 1
    zeros = [top // 2 + 1] if format_.symmetric else list(range(top + 1))
    steps = torch.linspace(-1, 1, 1201)[:, None, None] * weight.abs().amax(1, keepdim=True) * 1.5 / max(1, top // 2)
    best = torch.full((12,), torch.inf)
    for zero in zeros:
        codes = (weight / steps + zero).nan_to_num().round().clamp(0, top)
        error = (weights * (steps * (codes - zero) - weight).square()).sum(-1).amin(0)
        best = torch.minimum(best, error)
    ours = (weights * (format_.decode(encode_nearest(format_, weight, weights)) - weight).square()).sum(1)
    assert ours.sum() <= 1.03 * best.sum()


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_unpack_to_what_they_say(name: str) -> None:
    format_ = grid(name)
    assert isinstance(format_, IntegerFormat)
    data = encode_nearest(format_, sample("normal", 6, 384), importance(384))
    codes, scale, zero = format_.unpack(data)
    assert codes.dtype == torch.uint8 and scale.dtype == torch.float16 and (zero is None) == format_.symmetric
    origin = torch.tensor(2.0 ** (format_.num_bits - 1)) if zero is None else zero.float().unsqueeze(-1)
    values = scale.float().unsqueeze(-1) * (codes.float().unflatten(1, (-1, format_.group)) - origin)
    assert torch.equal(format_.decode(data), values.flatten(1))
    head = {"sym": 2, "asym": 3, "offset": 4}[format_.kind]
    stream = np.unpackbits(data.unflatten(1, (384 // format_.group, -1))[..., head:].contiguous().numpy(), axis=-1, bitorder="little")
    places = 2 ** np.arange(format_.num_bits)
    assert np.array_equal((stream.reshape(6, 384, -1) * places).sum(-1), codes.numpy())


@pytest.mark.parametrize("bits", range(1, 9))
def test_fields_come_back(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (3, 2, 256), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    assert torch.equal(unpack_dense(pack_dense(codes, bits), bits), codes)
    assert pack_dense(codes, bits).shape == (3, 2, 32 * bits)
    for stride in (1, 16, 32) if bits in (1, 2, 4, 8) else ():
        assert torch.equal(unpack_fields(pack_fields(codes, bits, stride), bits, stride), codes)


@pytest.mark.parametrize("name", ["Q8_0", "Q2_K", "Q3_K", "TQ2_0", "IQ4_NL", "MXFP4"])
def test_compiled_loops_choose_as_tensors_do(name: str) -> None:
    """On borders between levels, and beyond the last ones, too."""
    levels = grid(name).levels
    target = torch.cat([torch.arange(-300, 300) / 2, torch.linspace(-140, 140, 4001), torch.tensor([torch.inf, -torch.inf, 1e30])])
    assert torch.equal(grid(name).codes(target.unsqueeze(0), torch.ones(1, 1))[0], nearest(levels, grid(name).uniform, target))


def test_nearest_is_nearest_on_uneven_levels() -> None:
    for name in ("IQ4_NL", "MXFP4"):
        levels = grid(name).levels
        target = torch.linspace(-140, 140, 4001)
        chosen = levels[nearest(levels, grid(name).uniform, target).long()]
        distance = (target[:, None] - levels).abs().amin(1)
        assert torch.equal((target - chosen).abs(), distance)


@pytest.mark.parametrize(("name", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16), ("F32", torch.float32)])
def test_floats_are_rounded_to_nearest(name: str, dtype: torch.dtype) -> None:
    weight = sample("normal", 8, 64)
    weight[0, :4] = torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8])
    data = formats.get(name).encode(weight)  # type: ignore[attr-defined]
    expected = gguf.quants.quantize(weight.numpy(), getattr(gguf.GGMLQuantizationType, name)).view(np.uint8)
    assert np.array_equal(data.numpy(), expected)
    assert torch.equal(formats.get(name).decode(data), weight.to(dtype).float())


def test_f16_refuses_what_would_become_infinite() -> None:
    weight = torch.tensor([[65519.0, 1.0]])
    assert formats.get("F16").decode(formats.get("F16").encode(weight))[0, 0] == 65504  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"6\.552e\+04 is beyond 6\.55e\+04, the largest that F16 can hold.*F32"):
        formats.get("F16").encode(torch.tensor([[65520.0]]))  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def libggml() -> ctypes.CDLL:
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python, which brings libggml, is not installed")
    found = sorted((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))
    if not found:
        pytest.skip("this build of llama-cpp-python has no library ggml-base of its own")
    return ctypes.CDLL(str(found[0]))


def grid(name: str) -> GridFormat:
    format_ = formats.get(name)
    assert isinstance(format_, GridFormat)
    return format_


def ggml_name(name: str) -> str:
    return name[:-1].lower() + "K" if name.endswith("_K") else name.lower()


def gguf_values(name: str, data: Tensor) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(data.numpy(), getattr(gguf.GGMLQuantizationType, name)).copy())


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.dtype == expected.dtype == torch.float32
    assert torch.equal(got.view(torch.int32), expected.view(torch.int32))


def any_bytes(name: str) -> Tensor:
    """Blocks of random bytes, with halves that are finite."""
    layout = grid(name).layout  # type: ignore[attr-defined]
    rng = np.random.default_rng(3)
    parts = {part: torch.from_numpy(rng.integers(0, 256, (20, 2, size), dtype=np.uint8)) for part, size in layout.sizes.items()}
    for part in parts.keys() & {"d", "dmin", "m"}:
        parts[part] = torch.from_numpy(rng.standard_normal((20, 2)).astype(np.float16).view(np.uint8).reshape(20, 2, 2))
    return layout.join(parts)


def importance(columns: int) -> Tensor:
    return torch.randn(columns, generator=torch.Generator().manual_seed(7)).exp()


def sample(kind: str, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    normal = torch.randn(rows, columns, generator=generator) * 0.02
    if kind == "laplace":
        return normal.sign() * torch.empty(rows, columns).exponential_(generator=generator) * 0.02
    if kind == "outliers":
        return normal * torch.where(torch.rand(rows, columns, generator=generator) < 0.01, 10, 1)
    return normal


def weighted_error(name: str, data: Tensor, weight: Tensor) -> float:
    return float((importance(weight.shape[1]) * (grid(name).decode(data) - weight).square()).sum())
