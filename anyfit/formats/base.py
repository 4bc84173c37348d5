"""The contract of a storage format.

A format turns a matrix into the very bytes that a runtime's file holds, and back. Nearly all of them are
*grid* formats: each column of a row is `scale * level - offset`, where the level is one of a short list that
the whole format shares and scale and offset belong to a group of columns. Such a format fits scales and
offsets for a span of columns and packs codes; whoever chooses the codes (rounding, GPTQ, ...) needs to know
no format by name, and what is chosen is what the file holds, to the bit.

The rows of a matrix are stored each by itself, but for formats in which they have something in common (`Format.whole`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from anyfit.activations import Rounding
from anyfit.formats.choose import choose_each, levels_book

SPAN = 256
"""Columns whose scales are fitted together. Every format's group divides it, so one order of the columns (and
so one factorisation of the statistics) serves every format. A row's last span may be shorter."""


@dataclass(frozen=True)
class Scales:
    """The grids of one span, exactly as they are stored.

    `scale` and `offset` are float32, (rows, groups): column c of the span stands for
    `scale[:, c // group] * level - offset[:, c // group]`, computed in float32 in this order, which is what
    the runtimes do. `stored` holds what `pack` writes (halves, small integers), (rows, ...) each, with one
    entry or one entry per group along the second dimension.
    """

    scale: Tensor
    offset: Tensor
    stored: dict[str, Tensor]


class Format(ABC):
    """How the numbers of a matrix are stored."""

    name: str
    block: int
    """A row's length must be a multiple of this many columns."""
    overhead: int = 0
    """Stored bytes of a row besides its `bits`, whatever its length: a scale or tables of its own."""
    shared: int = 0
    """Stored bytes of a matrix besides its rows: what these have in common, codebooks for instance."""
    rounds: bool = False
    """Whether what such a matrix multiplies is rounded, too."""

    @property
    @abstractmethod
    def bits(self) -> float:
        """Stored bits per weight, scales and all counted, but for `overhead` and `shared`."""

    @property
    def whole(self) -> bool:
        """Whether a matrix is encoded all at once, as its rows have something in common, and rows of its bytes mean nothing alone."""
        return self.shared > 0

    def refuses(self, shape: tuple[int, int]) -> str | None:
        """Why this format can't hold a matrix of `shape`; None where it can."""
        if shape[1] % self.block:
            return f"row length {shape[1]} is not a multiple of {self.block}"
        if (self.overhead or self.shared) and 8 * self.bytes_(shape) >= 16 * shape[0] * shape[1]:
            return f"with what it stores besides codes, {self.name} would take no fewer bytes than 16 bits a weight"
        return None

    def row_bytes(self, columns: int) -> int:
        """Stored bytes of one row."""
        bits = columns * self.bits + 8 * self.overhead
        assert bits == int(bits) and bits % 8 == 0, (self.name, columns)
        return int(bits) // 8

    def bytes_(self, shape: tuple[int, int]) -> int:
        """Stored bytes of a matrix, exact."""
        return self.shared + shape[0] * self.row_bytes(shape[1])

    def data_rows(self, shape: tuple[int, int]) -> int:
        """Rows of the array that a matrix's bytes are kept in, uint8 (data_rows, row_bytes): its own are the last, behind those that hold
        what they share. The latter are filled up, which `bytes_` doesn't count."""
        return self._shared_rows(self.row_bytes(shape[1])) + shape[0]

    def rows(self, data: Tensor, which: Tensor | slice) -> Tensor:
        """The bytes of some of the rows, with what they share: those of a matrix of these rows, (data_rows, row_bytes)."""
        first = self._shared_rows(data.shape[1])
        return torch.cat([data[:first], data[first:][which]]) if first else data[which]

    def _shared_rows(self, row_bytes: int) -> int:
        return -(-self.shared // row_bytes)

    @abstractmethod
    def decode(self, data: Tensor) -> Tensor:
        """uint8 (data_rows, row_bytes) to float32 (rows, columns), bit-equal to what the runtime computes."""

    def inputs(self, data: Tensor) -> Rounding | None:
        """How what such a matrix multiplies is rounded first; None where it isn't. Its bytes with or without its rows."""
        return None


class CastFormat(Format):
    """A floating-point type: storing is casting, and there is nothing to choose."""

    block = 1

    @abstractmethod
    def encode(self, weight: Tensor) -> Tensor:
        """(rows, columns) to uint8 (rows, row_bytes), rounded to the nearest."""


class GridFormat(Format):
    """Codes on a grid of `levels`, with scales and offsets per `group` columns."""

    group: int
    """Columns that share a scale. Divides `block` or is a multiple of it; divides `SPAN` or equals it."""
    levels: Tensor
    """float32 (K,): what code k stands for before scale and offset, in any order."""
    vector: int = 1
    """Consecutive columns that are coded together, as one entry of a codebook. Divides `group`. Beyond 1, not every
    combination of codes can be stored; `book` and whatever else chooses them keeps to those that can."""
    scale_half: str | None = None
    """Which of `Scales.stored` are the halves that all scales are proportional to, (rows, k); None where there are none."""
    offset_half: str | None = None
    """The same for the offsets; the same name where one half is in both."""

    @cached_property
    def uniform(self) -> bool:
        """Whether the levels are consecutive whole numbers, so that rounding finds the nearest."""
        return bool((self.levels.diff() == 1).all())

    @cached_property
    def book(self) -> Any:
        """What compiled loops choose codes by, see `choose`."""
        return levels_book(self.levels, self.uniform)

    def codes(self, target: Tensor, metric: Tensor) -> Tensor:
        """Codes of the storable levels nearest to `target`, uint8 (vector, ...).

        `target` (vector, ...): weights as levels, (weight + offset) / scale. `metric` (vector, vector), positive
        definite: the error of a difference e is e @ metric @ e.
        """
        targets = target.float().flatten(1).T.contiguous()
        codes = torch.empty(targets.shape, dtype=torch.uint8)
        choose_each(self.book, metric.float().contiguous().numpy(), targets.numpy(), codes.numpy())
        return codes.T.reshape(target.shape)

    @abstractmethod
    def assemble(self, stored: dict[str, Tensor]) -> Scales:
        """Scales from what is stored of them, for whole rows: for those who change the halves."""

    @abstractmethod
    def fit(self, weight: Tensor, importance: Tensor) -> Scales:
        """Scales for one span that make the weighted squared error of plain rounding small.

        `weight` (rows, span) float32, `importance` (span,) positive float32: the weight of each column's
        squared error. Scales come out as stored (rounded to halves, multiplied by small integers) before any
        code is chosen. Rows of zeros give finite scales.
        """

    @abstractmethod
    def pack(self, codes: Tensor, scales: Scales) -> Tensor:
        """uint8 codes (rows, columns) and the scales of all spans, joined along the groups, to the file's
        bytes, uint8 (rows, row_bytes)."""

    @abstractmethod
    def read(self, data: Tensor) -> tuple[Tensor, Scales]:
        """The inverse of `pack`: uint8 codes (rows, columns), and the scales of whole rows."""

    def decode(self, data: Tensor) -> Tensor:
        codes, scales = self.read(data)
        levels = codes.float() + self.levels[0] if self.uniform else self.levels[codes.int()]
        groups = levels.unflatten(1, (-1, self.group))
        return groups.mul_(scales.scale.unsqueeze(-1)).sub_(scales.offset.unsqueeze(-1)).flatten(1)


def nearest(levels: Tensor, uniform: bool, target: Tensor) -> Tensor:
    """Codes of the levels nearest to `target` (any shape), uint8."""
    if uniform:
        return (target.round() - levels[0]).clamp_(0, len(levels) - 1).to(torch.uint8)
    ordered, order = levels.sort(stable=True)
    middles = (ordered[1:] + ordered[:-1]) / 2
    return order[torch.bucketize(target.contiguous(), middles)].to(torch.uint8)


def quantize(format_: GridFormat, weight: Tensor, scale: Tensor, offset: Tensor, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes and values nearest to `weight` (rows, columns); `scale` and `offset` are of its shape.

    `importance` (columns,): the weight of each column's squared error, where columns are coded together; all alike
    without it. A group whose scale is zero stands for `-offset` whatever the code.
    """
    target = (weight + offset) * torch.where(scale == 0, 0, 1 / scale)
    if format_.vector == 1:
        codes = format_.codes(target.unsqueeze(0), torch.ones(1, 1))[0]
    else:
        codes = _vector_codes(format_, target, torch.ones(target.shape[1]) if importance is None else importance)
    return codes, format_.levels[codes.int()] * scale - offset


def _vector_codes(format_: GridFormat, target: Tensor, importance: Tensor) -> Tensor:
    """(rows, columns) as levels to the codes of least weighted error, vector by vector."""
    codes = torch.empty(target.shape, dtype=torch.uint8)
    floor = importance.amax() * 1e-6 + torch.finfo(torch.float32).tiny
    for part in torch.arange(target.shape[1]).split(format_.vector):
        codes[:, part] = format_.codes(target[:, part].T, importance[part].clamp_min(floor).diag()).T
    return codes


def join(parts: list[Scales]) -> Scales:
    """The scales of consecutive spans as those of the whole rows."""
    return Scales(
        scale=torch.cat([p.scale for p in parts], 1),
        offset=torch.cat([p.offset for p in parts], 1),
        stored={key: torch.cat([p.stored[key] for p in parts], 1) for key in parts[0].stored},
    )
