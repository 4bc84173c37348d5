"""Formats that can be made of a finer one: one stored matrix then holds all of them.

Codebooks of rows are nested as they are made: the finer one's bytes hold the very bytes of the coarser one, so nothing is lost.

Integers can be trained for it, and are others than they would be by themselves. Of such a family all are whole numbers times a half for
each group of equally many columns. With D bits fewer, integers are the finer ones over 2^D, halves rounded up and clipped, and the half
is 2^D times as large, which is exact.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from anyfit.formats import formats
from anyfit.formats.base import Format, GridFormat, Scales
from anyfit.formats.table import TableFormat


def bounds(bits: int) -> tuple[int, int]:
    """The lowest and the highest integer."""
    return -(2 ** (bits - 1)), 2 ** (bits - 1) - 1


def switched(stored: Tensor, high: int, low: int) -> Tensor:
    """The integers of `low` bits out of those of `high`, int8; integer operations only."""
    step = high - low
    half = (1 << step) >> 1
    return ((stored.short() + half) >> step).clamp_(*bounds(low)).to(torch.int8)


def nested_bits(format_: Format) -> int | None:
    """The bits of the format's integers; None where it can't be nested."""
    if not isinstance(format_, GridFormat) or not format_.uniform or format_.offset_half or not format_.scale_half or format_.vector > 1:
        return None
    bits = len(format_.levels).bit_length() - 1
    lowest, highest = bounds(bits)
    whole = float(format_.levels[0]) == lowest and float(format_.levels[-1]) == highest
    return bits if whole and format_.block == format_.group else None


def packed(format_: GridFormat, integers: Tensor, scale: Tensor) -> Tensor:
    """The bytes of int8 `integers` (rows, columns) and halves `scale` (rows, groups)."""
    assert format_.scale_half is not None
    codes = (integers.short() - int(format_.levels[0])).to(torch.uint8)
    return format_.pack(codes, format_.assemble({format_.scale_half: scale}))


def integers_of(format_: GridFormat, data: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `packed`."""
    codes, scales = format_.read(data)
    return (codes.short() + int(format_.levels[0])).to(torch.int8), _halves(format_, scales)


def integer_sizes(names: Iterable[str]) -> dict[str, int]:
    """{format: bits} of the integers among `names` that can be made of the finest of them, which is the first. Names of other choices than
    formats are passed over."""
    grids = [format_ for name in names if name in formats and isinstance(format_ := formats.get(name), GridFormat)]
    bits = {format_: found for format_ in grids if (found := nested_bits(format_))}
    order = sorted(bits, key=lambda format_: -bits[format_])
    return {format_.name: bits[format_] for format_ in order if format_.group == order[0].group}


def held(names: Iterable[str], integers: bool = False) -> dict[str, str]:
    """{format: the finest of its kind in `names`}, of those that are made of that one: they need not be encoded or stored besides.
    Codebooks, whose very bytes the finest holds; with `integers` also those, which are others than they would be by themselves."""
    names = list(names)
    tables = [format_ for name in names if name in formats and isinstance(format_ := formats.get(name), TableFormat)]
    finest_first = [format_.name for format_ in sorted(tables, key=lambda format_: -format_.num_bits)]
    kinds = [finest_first, list(integer_sizes(names)) if integers else []]
    return {name: own[0] for own in kinds for name in own[1:]}


def lowered(high: Format, low: Format, data: Tensor) -> Tensor:
    """The bytes of the coarser format out of those of the finer one, (rows, bytes) each."""
    if isinstance(high, TableFormat):
        assert isinstance(low, TableFormat), (high.name, low.name)
        return high.lowered(low, data)
    assert isinstance(high, GridFormat) and isinstance(low, GridFormat), (high.name, low.name)
    many, few = nested_bits(high), nested_bits(low)
    assert many is not None and few is not None and many >= few and high.group == low.group, (high.name, low.name)
    integers, scale = integers_of(high, data)
    return packed(low, switched(integers, many, few), (scale.float() * 2 ** (many - few)).to(scale.dtype))


def _halves(format_: GridFormat, scales: Scales) -> Tensor:
    assert format_.scale_half is not None
    return scales.stored[format_.scale_half]
