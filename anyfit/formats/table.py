"""Codebooks: each row has tables of halves, and its codes are places in them.

A row of `tableB` in bytes: the tables of 4, 8, ... 2^B halves, then codes of B bits as a dense stream, lowest bits first. A weight is the
entry of the last table at its code. The upper p bits of a code are its place in the table of 2^p, so whoever has a row of many bits
has those of fewer bits, too: one file is read at any of its sizes. That is what the smaller tables are there for; they take about as much
again as the last one, which in rows of 4096 columns is 0.05 bits a weight at four bits, and a whole bit at eight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyfit.formats import TABLE_BITS
from anyfit.formats.base import Format
from anyfit.formats.fields import half_bytes, pack_dense, read_halves, unpack_dense
from anyfit.formats.fitting import HALF_MAX, refuse_beyond
from anyfit.formats.fitting_tables import SEED, entries, fit_tables

_NUMBERS_AT_ONCE = 1 << 20
"""Looked up together: places take eight bytes each."""


class TableFormat(Format):
    """Codes of `num_bits`, see above. `bits` counts these alone, the tables are `overhead`. `seed`: see `fit_tables`."""

    block = 8

    def __init__(self, num_bits: int, seed: int = SEED) -> None:
        self.name, self.num_bits, self._seed = f"table{num_bits}", num_bits, seed
        self.entries = entries(num_bits)
        self.overhead = 2 * self.entries

    @property
    def bits(self) -> float:
        return float(self.num_bits)

    def encode(self, weight: Tensor, importance: Tensor) -> Tensor:
        """(rows, columns) to uint8 (rows, row_bytes). `importance` (columns,): what each column's squared error counts."""
        refuse_beyond(self.name, HALF_MAX, weight)
        return self.pack(*fit_tables(weight, importance, self.num_bits, self._seed))

    @property
    def alone(self) -> TableFormat:
        """The same with the best codebook that there is for its own size, whatever is nested in it."""
        return TableFormat(self.num_bits, self.num_bits)

    def pack(self, codes: Tensor, tables: Tensor) -> Tensor:
        """uint8 (rows, columns) and float16 (rows, entries) to the file's bytes, uint8 (rows, row_bytes)."""
        return torch.cat([half_bytes(tables).flatten(1), pack_dense(codes, self.num_bits)], 1)

    def read(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `pack`."""
        tables, codes = data[:, : self.overhead], data[:, self.overhead :]
        return unpack_dense(codes, self.num_bits), read_halves(tables.unflatten(1, (self.entries, 2)))

    def decode(self, data: Tensor) -> Tensor:
        return looked_up(*self.read(data))

    def lowered(self, coarser: TableFormat, data: Tensor) -> Tensor:
        """The bytes of a format of no more bits out of this one's, (rows, row_bytes) each: the very ones that it makes by itself."""
        codes, tables = self.read(data)
        return coarser.pack(codes >> (self.num_bits - coarser.num_bits), tables[:, : coarser.entries])


def looked_up(codes: Tensor, tables: Tensor) -> Tensor:
    """Float32 (rows, columns): what codes uint8 (rows, columns) stand for in the last of the tables float16 (rows, entries)."""
    last = tables[:, -((tables.shape[1] + 4) // 2) :].float()
    found = torch.empty(codes.shape)
    step = max(1, _NUMBERS_AT_ONCE // max(1, codes.shape[1]))
    for start in range(0, len(codes), step):
        some = slice(start, start + step)
        torch.gather(last[some], 1, codes[some].long(), out=found[some])
    return found


BY_NAME = {format_.name: format_ for format_ in map(TableFormat, TABLE_BITS)}
globals().update(BY_NAME)
