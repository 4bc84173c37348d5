"""What all GGUF types share: blocks of bytes, with planes of bits for the codes and a few bytes for the scales.

Bytes and arithmetic are ggml's: https://github.com/ggml-org/ggml, `src/ggml-common.h` (the structures
`block_*`) and `src/ggml-quants.c` (`dequantize_row_*`).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.formats.base import GridFormat, Scales
from anyfit.formats.fields import pack_fields, unpack_fields

Parts = dict[str, Tensor]
"""Parts of blocks by ggml's names for them, (rows, blocks, ...) each."""


@dataclass(frozen=True)
class Layout:
    """A block of `block` columns: `sizes` are the bytes of its parts by name, in the order of the file.

    `planes`: the parts that hold the codes, lowest bits first, each with its bits and stride (see
    `fields.pack_fields`). `signed`: the file holds code - 128 as signed bytes.
    """

    block: int
    sizes: dict[str, int]
    planes: dict[str, tuple[int, int]]
    signed: bool = False

    def split(self, data: Tensor) -> Parts:
        """uint8 (rows, bytes) to the parts of all blocks."""
        blocks = data.unflatten(1, (-1, sum(self.sizes.values())))
        return dict(zip(self.sizes, blocks.split(list(self.sizes.values()), -1), strict=True))

    def join(self, parts: Parts) -> Tensor:
        """The inverse of `split`."""
        return torch.cat([parts[part] for part in self.sizes], -1).flatten(1)

    def pack_codes(self, codes: Tensor) -> Parts:
        """uint8 (rows, columns) to the parts that hold the codes."""
        blocks = codes.unflatten(1, (-1, self.block))
        if self.signed:
            blocks = blocks ^ 128
        parts, shift = {}, 0
        for part, (bits, stride) in self.planes.items():
            parts[part] = pack_fields((blocks >> shift) & (2**bits - 1), bits, stride)
            shift += bits
        return parts

    def read_codes(self, parts: Parts) -> Tensor:
        """The inverse of `pack_codes`."""
        shift, planes = 0, []
        for part, (bits, stride) in self.planes.items():
            planes.append(unpack_fields(parts[part], bits, stride) << shift)
            shift += bits
        codes = sum(planes[1:], planes[0]).flatten(1)
        return codes ^ 128 if self.signed else codes


class BlockFormat(GridFormat):
    """A GGUF type. What is left to a kind of type: how scales are fitted, packed and read."""

    def __init__(self, name: str, levels: Tensor, group: int, layout: Layout) -> None:
        self.name, self.levels, self.group, self.layout, self.block = name, levels, group, layout, layout.block

    @property
    def bits(self) -> float:
        return 8 * sum(self.layout.sizes.values()) / self.block

    def pack(self, codes: Tensor, scales: Scales) -> Tensor:
        num_blocks = codes.shape[1] // self.block
        stored = {key: part.unflatten(1, (num_blocks, -1)) for key, part in scales.stored.items()}
        return self.layout.join(self.layout.pack_codes(codes) | self.pack_scales(stored))

    def assemble(self, stored: dict[str, Tensor]) -> Scales:
        num_blocks = min(part.shape[1] for part in stored.values())  # each kind of block has a part with one entry
        scale, offset = self.grids({key: part.unflatten(1, (num_blocks, -1)) for key, part in stored.items()})
        return Scales(scale.flatten(1), offset.flatten(1), stored)

    def read(self, data: Tensor) -> tuple[Tensor, Scales]:
        parts = self.layout.split(data)
        stored = {key: part.flatten(1) for key, part in self.read_scales(parts).items()}
        return self.layout.read_codes(parts), self.assemble(stored)

    @abstractmethod
    def pack_scales(self, stored: Parts) -> Parts:
        """What `Scales.stored` holds, (rows, blocks, entries), to the bytes of parts."""

    @abstractmethod
    def read_scales(self, parts: Parts) -> Parts:
        """The inverse of `pack_scales`."""

    @abstractmethod
    def grids(self, stored: Parts) -> tuple[Tensor, Tensor]:
        """What `Scales.stored` holds, (rows, blocks, entries), to float32 scales and offsets, (rows, blocks, groups of a block)."""


def counting(low: int, high: int) -> Tensor:
    """Levels `low` to `high`, whole numbers."""
    return torch.arange(low, high + 1, dtype=torch.float32)
