"""The GGUF "IQ" types: magnitudes of several columns are one entry of a codebook, and each column has a sign.

256 columns share a half; each 16 or 32 of them have a number of four bits, and the scale unit * half * (2 * number + 1).
The codebooks are those of the gguf package. In the types that store seven signs of eight, the number of negative ones
is even. IQ4_XS has no codebook: its columns are coded one by one on uneven levels.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import cache, cached_property

import gguf
import numpy as np
import torch
from torch import Tensor

from anyfit.formats import gguf_iq_fit
from anyfit.formats.base import SPAN, GridFormat, Scales
from anyfit.formats.fields import half_bytes, pack_fields, read_halves, unpack_fields
from anyfit.formats.fitting import HALF_MAX, listed, refuse_beyond
from anyfit.formats.fitting_scale import ScaleSearch
from anyfit.formats.fitting_two_level import TwoLevel
from anyfit.formats.gguf import IQ4_NL
from anyfit.formats.gguf_blocks import Layout, Parts
from anyfit.formats.gguf_iq_choose import PLACE, WIDTH, Codebook
from anyfit.formats.gguf_k import TwoLevelScaled
from anyfit.formats.threads import each


class CodebookFormat(GridFormat):
    """What is left to a kind of type: where indices, signs and numbers stand in a block.

    Code k of a column is the k-th smallest magnitude of the codebook; with as many added, its negative.
    """

    vector = WIDTH
    scale_half = "d"
    block = SPAN
    even = False
    """Whether an even number of the signs of a vector must be negative."""

    def __init__(self, name: str, group: int, layout: Layout, unit: float) -> None:
        self.name, self.group, self.layout, self.unit = name, group, layout, unit
        book = getattr(gguf.quants, name)
        book.init_grid()
        entries = book.grid.reshape(book.grid_shape)
        magnitudes = np.unique(entries)
        self.num_magnitudes = len(magnitudes)
        self.levels = torch.from_numpy(np.concatenate([magnitudes, -magnitudes]))
        self.entries = np.ascontiguousarray(entries.T)
        self.entry_codes = torch.from_numpy(np.searchsorted(magnitudes, entries).astype(np.uint8))

    @property
    def bits(self) -> float:
        return 8 * sum(self.layout.sizes.values()) / self.block

    @cached_property
    def book(self) -> Codebook:
        assert self.entries.shape[1] <= PLACE + 1, f"{self.name} has more entries than compiled loops can tell apart"
        return Codebook(self.entries, self.entry_codes.numpy(), self.num_magnitudes, self.even)

    @cached_property
    def places(self) -> Tensor:
        """int16: the index of the entry with given codes, which are the digits of the place; -1 where there is none."""
        size = self.entry_codes.shape[1]
        places = torch.full((self.num_magnitudes**size,), -1, dtype=torch.int16)
        places[self._digits(self.entry_codes)] = torch.arange(len(self.entry_codes), dtype=torch.int16)
        return places

    def _digits(self, codes: Tensor) -> Tensor:
        """(..., size) codes of magnitudes to whole numbers (...,)."""
        return (codes.long() * self.num_magnitudes ** torch.arange(codes.shape[-1])).sum(-1)

    def fit(self, weight: Tensor, importance: Tensor) -> Scales:
        top = self.unit * (2 * gguf_iq_fit.NUMBERS - 1) * float(self.levels.max())
        refuse_beyond(self.name, HALF_MAX * top, weight)
        mean = importance.contiguous().mean()
        weights = (importance / mean).clamp_min(1e-4) if mean > 0 else torch.ones_like(importance)
        columns, counted = weight.contiguous().numpy(), weights.contiguous().numpy()
        parts = gguf_iq_fit.parts_of(counted, self.entries)
        half, numbers = np.empty(len(columns), np.float32), np.empty((len(columns), columns.shape[1] // self.group), np.uint8)

        def some(rows: slice) -> None:
            gguf_iq_fit.fit(columns[rows], counted, parts, self.even, self.group, self.unit, half[rows], numbers[rows])

        each(some, len(columns), 8)
        return self.assemble({"d": torch.from_numpy(half).half().unsqueeze(1), "numbers": torch.from_numpy(numbers)})

    def assemble(self, stored: dict[str, Tensor]) -> Scales:
        half, numbers = stored["d"].float(), stored["numbers"].unflatten(1, (stored["d"].shape[1], -1))
        scale = (half.unsqueeze(-1) * ((2 * numbers.float() + 1) * self.unit)).flatten(1)
        return Scales(scale, torch.zeros_like(scale), stored)

    def pack(self, codes: Tensor, scales: Scales) -> Tensor:
        blocks = codes.unflatten(1, (-1, self.block))
        index = self.places[self._digits((blocks % self.num_magnitudes).unflatten(-1, (-1, self.entry_codes.shape[1])))]
        assert (index >= 0).all(), f"a combination of codes that {self.name} can't store"
        signs = pack_fields((blocks >= self.num_magnitudes).to(torch.uint8), 1, 1)
        numbers = scales.stored["numbers"].unflatten(1, (blocks.shape[1], -1))
        return self.layout.join({"d": half_bytes(scales.stored["d"]), **self.weave(index, signs, numbers)})

    def read(self, data: Tensor) -> tuple[Tensor, Scales]:
        parts = self.layout.split(data)
        index, signs, numbers = self.unravel(parts)
        codes = self.entry_codes[index.int()].flatten(1).add_(unpack_fields(signs, 1, 1).flatten(1), alpha=self.num_magnitudes)
        return codes, self.assemble({"d": read_halves(parts["d"]), "numbers": numbers.flatten(1)})

    @abstractmethod
    def weave(self, index: Tensor, signs: Tensor, numbers: Tensor) -> Parts:
        """All parts but the half: of int16 indices of entries (rows, blocks, entries), uint8 signs (rows, blocks, 32), a bit
        for each column, and uint8 numbers (rows, blocks, groups)."""

    @abstractmethod
    def unravel(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
        """The inverse of `weave`."""


class SignsAndNumbers(CodebookFormat):
    """A word of 32 bits for each 32 columns: seven signs of each vector, then the number."""

    even = True

    def weave(self, index: Tensor, signs: Tensor, numbers: Tensor) -> Parts:
        fields = [*((signs.unflatten(-1, (-1, 4)).long() & 127).unbind(-1)), numbers.long()]
        words = sum(field << 7 * place for place, field in enumerate(fields))
        return self.place(index.to(torch.uint8), words.unsqueeze(-1).view(torch.uint8)[..., :4])

    def unravel(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
        index, data = self.find(parts)
        wide = torch.zeros(*data.shape[:-1], 8, dtype=torch.uint8)
        wide[..., :4] = data
        words = wide.view(torch.int64)
        signs = even_signs()[words >> torch.arange(0, 28, 7) & 127]
        return index.short(), signs.flatten(-2), (words >> 28).flatten(-2).to(torch.uint8)

    def place(self, index: Tensor, words: Tensor) -> Parts:
        """uint8 indices (rows, blocks, entries) and words (rows, blocks, 8, 4): each kind together."""
        return {"qs": index, "scales": words.flatten(-2)}

    def find(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """The inverse of `place`."""
        return parts["qs"], parts["scales"].unflatten(-1, (-1, 4))


class Alternating(SignsAndNumbers):
    """Four indices, a word, and so on."""

    def place(self, index: Tensor, words: Tensor) -> Parts:
        return {"qs": torch.cat([index.unflatten(-1, (-1, 4)), words], -1).flatten(-2)}

    def find(self, parts: Parts) -> tuple[Tensor, Tensor]:
        index, words = parts["qs"].unflatten(-1, (-1, 8)).split(4, -1)
        return index.flatten(-2), words


class NibbleNumbers(CodebookFormat):
    """Numbers two by two in bytes of their own."""

    def weave(self, index: Tensor, signs: Tensor, numbers: Tensor) -> Parts:
        return {**self.weave_entries(index, signs), "scales": pack_fields(numbers, 4, 1)}

    def unravel(self, parts: Parts) -> tuple[Tensor, Tensor, Tensor]:
        return *self.unravel_entries(parts), unpack_fields(parts["scales"], 4, 1)

    @abstractmethod
    def weave_entries(self, index: Tensor, signs: Tensor) -> Parts:
        """Indices and signs, as in `weave`."""

    @abstractmethod
    def unravel_entries(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """The inverse of `weave_entries`."""


class SignsAboveIndex(NibbleNumbers):
    """Sixteen bits for each vector: nine of the index, seven signs."""

    even = True

    def weave_entries(self, index: Tensor, signs: Tensor) -> Parts:
        high = index >> 8 | (signs.short() & 127) << 1
        return {"qs": torch.stack([index & 255, high], -1).to(torch.uint8).flatten(-2)}

    def unravel_entries(self, parts: Parts) -> tuple[Tensor, Tensor]:
        low, high = parts["qs"].unflatten(-1, (-1, 2)).short().unbind(-1)
        return low | (high & 1) << 8, even_signs()[high.long() >> 1]


class AllSigns(NibbleNumbers):
    """All eight signs of a vector; the high bits of the indices, one or two, in bytes of their own."""

    def __init__(self, name: str, group: int, layout: Layout, unit: float, high_bits: int) -> None:
        super().__init__(name, group, layout, unit)
        self.high_bits = high_bits

    def weave_entries(self, index: Tensor, signs: Tensor) -> Parts:
        high = pack_fields((index >> 8).to(torch.uint8), self.high_bits, 1)
        return {"qs": (index & 255).to(torch.uint8), "qh": high, "signs": signs}

    def unravel_entries(self, parts: Parts) -> tuple[Tensor, Tensor]:
        return parts["qs"].short() | unpack_fields(parts["qh"], self.high_bits, 1).short() << 8, parts["signs"]


class SplitNumbers(TwoLevelScaled):
    """Eight signed numbers of six bits: four bytes of nibbles, two of pairs of bits."""

    def __init__(self, name: str, levels: Tensor, layout: Layout, search: ScaleSearch, second: TwoLevel) -> None:
        super().__init__(name, levels, layout, search, second)
        self.group = 32

    def pack_scales(self, stored: Parts) -> Parts:
        unsigned = (stored["scales"] + 32).view(torch.uint8)
        low, high = pack_fields(unsigned & 15, 4, 1), pack_fields(unsigned >> 4, 2, 1)
        return {"d": half_bytes(stored["d"]).flatten(2), "scales_h": high, "scales_l": low}

    def read_numbers(self, data: Tensor) -> Tensor:
        unsigned = unpack_fields(data[..., 2:], 4, 1) | unpack_fields(data[..., :2], 2, 1) << 4
        return unsigned.view(torch.int8) - 32

    def read_scales(self, parts: Parts) -> Parts:
        return super().read_scales({"d": parts["d"], "scales": torch.cat([parts["scales_h"], parts["scales_l"]], -1)})


@cache
def even_signs() -> Tensor:
    """The eight signs, as bits, that seven stored ones stand for, (128,) uint8."""
    return torch.frombuffer(bytearray(gguf.quants.IQ2_XXS.ksigns), dtype=torch.uint8)


_ALONG = tuple((sign * step, 0) for step in (6, 4, 3, 2, 1) for sign in (1, -1))

IQ2_XXS = Alternating("IQ2_XXS", 32, Layout(SPAN, {"d": 2, "qs": 64}, {}), 1 / 8)
IQ2_XS = SignsAboveIndex("IQ2_XS", 16, Layout(SPAN, {"d": 2, "qs": 64, "scales": 8}, {}), 1 / 8)
IQ2_S = AllSigns("IQ2_S", 16, Layout(SPAN, {"d": 2, "qs": 32, "signs": 32, "qh": 8, "scales": 8}, {}), 1 / 8, 2)
IQ3_XXS = SignsAndNumbers("IQ3_XXS", 32, Layout(SPAN, {"d": 2, "qs": 64, "scales": 32}, {}), 1 / 4)
IQ3_S = AllSigns("IQ3_S", 32, Layout(SPAN, {"d": 2, "qs": 64, "qh": 8, "signs": 32, "scales": 4}, {}), 1, 1)
IQ4_XS = SplitNumbers(
    "IQ4_XS",
    IQ4_NL.levels,
    Layout(SPAN, {"d": 2, "scales_h": 2, "scales_l": 4, "qs": 128}, {"qs": (4, 16)}),
    IQ4_NL.search,
    TwoLevel(listed(IQ4_NL.levels), -32, 31, (-32, -31, -30, -33, 31, 30, 32), _ALONG, with_offset=False),
)
