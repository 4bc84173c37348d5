"""The GGUF "K" types: 256 columns share one or two halves, and each 16 or 32 of them small whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfit.formats.base import SPAN, Scales
from anyfit.formats.fields import half_bytes, pack_fields, read_halves, unpack_fields
from anyfit.formats.fitting import HALF_MAX, Columns, fit_rows, refuse_beyond, whole
from anyfit.formats.fitting_lanes import Floats
from anyfit.formats.fitting_line import LineSearch
from anyfit.formats.fitting_scale import ScaleSearch
from anyfit.formats.fitting_two_level import TwoLevel
from anyfit.formats.gguf_blocks import BlockFormat, Layout, Parts, counting


class TwoLevelScaled(BlockFormat):
    """Value = d * number * level, with signed numbers."""

    scale_half = "d"

    def __init__(self, name: str, levels: Tensor, layout: Layout, search: ScaleSearch, second: TwoLevel) -> None:
        super().__init__(name, levels, 16, layout)
        self.search, self.second = search, second

    def fit(self, weight: Tensor, importance: Tensor) -> Scales:
        refuse_beyond(self.name, HALF_MAX * self.second.high * self.search.reach, weight)
        half, number = fit_rows(self._fit, weight, importance, self.group)
        scale = half * number
        return Scales(scale, torch.zeros_like(scale), {"d": half.half(), "scales": number.to(torch.int8)})

    def _fit(self, columns: Columns) -> tuple[Floats, ...]:
        return self.second.fit(columns, self.search.ideal(columns))

    def pack_scales(self, stored: Parts) -> Parts:
        return {"d": half_bytes(stored["d"]).flatten(2), "scales": self.pack_numbers(stored["scales"])}

    def read_scales(self, parts: Parts) -> Parts:
        return {"d": read_halves(parts["d"]).unsqueeze(-1), "scales": self.read_numbers(parts["scales"])}

    def grids(self, stored: Parts) -> tuple[Tensor, Tensor]:
        scale = stored["d"].float() * stored["scales"].float()
        return scale, torch.zeros_like(scale)

    def pack_numbers(self, numbers: Tensor) -> Tensor:
        """int8 (rows, blocks, 16) to uint8 (rows, blocks, bytes): as they are."""
        return numbers.view(torch.uint8)

    def read_numbers(self, data: Tensor) -> Tensor:
        """The inverse of `pack_numbers`."""
        return data.contiguous().view(torch.int8)


class SixBitScaled(TwoLevelScaled):
    """With numbers from -32 to 31 in six bits: eight bytes of low nibbles, four of high pairs of bits."""

    def pack_numbers(self, numbers: Tensor) -> Tensor:
        unsigned = (numbers + 32).view(torch.uint8)
        return torch.cat([pack_fields(unsigned & 15, 4, 8), pack_fields(unsigned >> 4, 2, 4)], -1)

    def read_numbers(self, data: Tensor) -> Tensor:
        unsigned = unpack_fields(data[..., :8], 4, 8) | unpack_fields(data[..., 8:], 2, 4) << 4
        return unsigned.view(torch.int8) - 32


class TwoLevelLine(BlockFormat):
    """Value = d * number * level - dmin * other number, neither number negative."""

    scale_half, offset_half = "d", "dmin"

    def __init__(self, name: str, group: int, layout: Layout, search: LineSearch, second: TwoLevel) -> None:
        super().__init__(name, counting(0, search.top), group, layout)
        self.search, self.second = search, second

    def fit(self, weight: Tensor, importance: Tensor) -> Scales:
        refuse_beyond(self.name, HALF_MAX * self.second.high, weight)
        half, number, offset_half, offset_number = fit_rows(self._fit, weight, importance, self.group)
        stored = {"d": half.half(), "dmin": offset_half.half(), "numbers": number.to(torch.uint8), "others": offset_number.to(torch.uint8)}
        return Scales(half * number, offset_half * offset_number, stored)

    def _fit(self, columns: Columns) -> tuple[Floats, ...]:
        return self.second.fit(columns, *self.search.ideal(columns))

    def pack_scales(self, stored: Parts) -> Parts:
        halves = {key: half_bytes(stored[key]).flatten(2) for key in ("d", "dmin")}
        return {**halves, "scales": self.pack_numbers(stored["numbers"], stored["others"])}

    def read_scales(self, parts: Parts) -> Parts:
        numbers, others = self.read_numbers(parts["scales"])
        return {**{key: read_halves(parts[key]).unsqueeze(-1) for key in ("d", "dmin")}, "numbers": numbers, "others": others}

    def grids(self, stored: Parts) -> tuple[Tensor, Tensor]:
        return stored["d"].float() * stored["numbers"].float(), stored["dmin"].float() * stored["others"].float()

    def pack_numbers(self, numbers: Tensor, others: Tensor) -> Tensor:
        """Twice uint8 (rows, blocks, 8), six bits each, to (rows, blocks, 12).

        Four bytes for the first half of each kind, whose upper pairs of bits take the high bits of the second
        half; its nibbles follow, those of both kinds in one byte.
        """
        first = [kind[..., :4] | kind[..., 4:] >> 4 << 6 for kind in (numbers, others)]
        return torch.cat([*first, numbers[..., 4:] & 15 | others[..., 4:] << 4], -1)

    def read_numbers(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `pack_numbers`."""
        first, other, nibbles = data.split(4, -1)
        numbers = torch.cat([first & 63, first >> 6 << 4 | nibbles & 15], -1)
        return numbers, torch.cat([other & 63, other >> 6 << 4 | nibbles >> 4], -1)


class NibbleLine(TwoLevelLine):
    """With numbers of four bits, both kinds in one byte."""

    def pack_numbers(self, numbers: Tensor, others: Tensor) -> Tensor:
        return numbers | others << 4

    def read_numbers(self, data: Tensor) -> tuple[Tensor, Tensor]:
        return data & 15, data >> 4


_AROUND = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1))
_ALONG = ((1, 0), (-1, 0))

Q6_K = TwoLevelScaled(
    "Q6_K",
    counting(-32, 31),
    Layout(SPAN, {"ql": 128, "qh": 64, "scales": 16, "d": 2}, {"ql": (4, 64), "qh": (2, 32)}),
    ScaleSearch.integers(6),
    TwoLevel(whole(-32, 31), -128, 127, (-128, 127), _ALONG, with_offset=False),
)
Q5_K = TwoLevelLine(
    "Q5_K",
    32,
    Layout(SPAN, {"d": 2, "dmin": 2, "scales": 12, "qh": 32, "qs": 128}, {"qs": (4, 32), "qh": (1, 32)}),
    LineSearch.integers(5, positive=True),
    TwoLevel(whole(0, 31), 0, 63, tuple(range(63, 55, -1)), _AROUND, with_offset=True),
)
Q4_K = TwoLevelLine(
    "Q4_K",
    32,
    Layout(SPAN, {"d": 2, "dmin": 2, "scales": 12, "qs": 128}, {"qs": (4, 32)}),
    LineSearch.integers(4, positive=True),
    TwoLevel(whole(0, 15), 0, 63, (63, 61, 59), _AROUND, with_offset=True),
)
Q3_K = SixBitScaled(
    "Q3_K",
    counting(-4, 3),
    Layout(SPAN, {"hmask": 32, "qs": 64, "scales": 12, "d": 2}, {"qs": (2, 32), "hmask": (1, 32)}),
    ScaleSearch.integers(3),
    TwoLevel(whole(-4, 3), -32, 31, (-32, -28, 29), _ALONG, with_offset=False),
)
Q2_K = NibbleLine(
    "Q2_K",
    16,
    Layout(SPAN, {"scales": 16, "qs": 64, "d": 2, "dmin": 2}, {"qs": (2, 32)}),
    LineSearch.integers(2, positive=True),
    TwoLevel(whole(0, 3), 0, 15, (15, 14, 13, 12, 16, 18, 21, 27), _AROUND, with_offset=True),
)
