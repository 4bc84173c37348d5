"""Additive codebooks that belong to one matrix: each group of columns is the sum of an entry of each, times its row's scale.

Paper: "Extreme Compression of Large Language Models via Additive Quantization" (AQLM), arXiv 2401.06118, section 3. `aqlm_2x8g8` has two
codebooks of 2^8 entries, for groups of 8 columns: two bits a weight, and the codebooks, which weigh on small matrices (8 KiB here).
2^16 entries, as in the paper's best, would only pay on matrices far larger than what a processor encodes in reasonable time.

Entries and scales are halves. The bytes are an array of equal rows. The first ones hold the codebooks, filled up with zeros; then
comes a row for each of the matrix: its scale (2), then its codes, those of a group side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.formats import AQLM_SCHEMES
from anyfit.formats.base import Format
from anyfit.formats.fields import half_bytes, read_halves

ENTRIES = 256
"""Of a codebook: a code is a byte."""
_HALF_BYTES = 2


@dataclass(frozen=True)
class Additive:
    """A matrix as it is stored. `codebooks` float16 (codebooks, entries, group), `scales` float16 (rows,), `codes` uint8 (rows, groups,
    codebooks)."""

    codebooks: Tensor
    scales: Tensor
    codes: Tensor

    @property
    def values(self) -> Tensor:
        """(rows, columns) float32, in the order of the runtime's operations."""
        return summed(self.codebooks.float(), self.codes).mul_(self.scales.float().unsqueeze(1))


def summed(codebooks: Tensor, codes: Tensor) -> Tensor:
    """The sums of entries that `codes` (rows, groups, codebooks) stand for, (rows, columns), in the type of the codebooks."""
    first, *rest = (book[part.int()] for book, part in zip(codebooks, codes.unbind(-1), strict=True))
    for part in rest:
        first += part
    return first.flatten(1)


class AdditiveFormat(Format):
    """`num_codebooks` for groups of `group` columns, see above."""

    overhead = _HALF_BYTES

    def __init__(self, num_codebooks: int, group: int) -> None:
        self.name = f"aqlm_{num_codebooks}x8g{group}"
        self.num_codebooks, self.group, self.block = num_codebooks, group, group
        self.shared = num_codebooks * ENTRIES * group * _HALF_BYTES

    @property
    def bits(self) -> float:
        return 8 * self.num_codebooks / self.group

    def pack(self, parts: Additive) -> Tensor:
        """To the array of bytes, uint8 (data_rows, row_bytes)."""
        rows = torch.cat([half_bytes(parts.scales), parts.codes.flatten(1)], 1)
        shared = rows.new_zeros(self._shared_rows(rows.shape[1]), rows.shape[1])
        shared.view(-1)[: self.shared] = half_bytes(parts.codebooks).flatten()
        return torch.cat([shared, rows])

    def read(self, data: Tensor) -> Additive:
        """The inverse of `pack`."""
        num_shared = self._shared_rows(data.shape[1])
        halves = data[:num_shared].reshape(-1)[: self.shared].view(-1, _HALF_BYTES)
        rows = data[num_shared:]
        return Additive(
            codebooks=read_halves(halves).view(self.num_codebooks, ENTRIES, self.group),
            scales=read_halves(rows[:, :_HALF_BYTES]),
            codes=rows[:, _HALF_BYTES:].unflatten(1, (-1, self.num_codebooks)),
        )

    def decode(self, data: Tensor) -> Tensor:
        return self.read(data).values


globals().update({name: AdditiveFormat(*scheme) for name, scheme in AQLM_SCHEMES.items()})
