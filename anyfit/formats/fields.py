"""Small integers to bytes and back, in the orders that the formats use. Vectorised, for little-endian machines."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_fields(codes: Tensor, bits: int, stride: int) -> Tensor:
    """uint8 (..., n) to (..., n * bits / 8) for 1, 2, 4 or 8 bits.

    Byte m of a run holds codes m, m + stride, m + 2 * stride, ... from its lowest bits upwards; a run is
    `8 / bits * stride` codes long.
    """
    parts = codes.unflatten(-1, (-1, 8 // bits, stride)).unbind(-2)
    data = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        data |= part << (place * bits)
    return data.flatten(-2)


def unpack_fields(data: Tensor, bits: int, stride: int) -> Tensor:
    """The inverse of `pack_fields`."""
    runs = data.unflatten(-1, (-1, stride))
    return torch.stack([(runs >> shift) & (2**bits - 1) for shift in range(0, 8, bits)], -2).flatten(-3)


def pack_dense(codes: Tensor, bits: int) -> Tensor:
    """uint8 (..., n) to (..., n * bits / 8) for any width up to 8, n a multiple of 8.

    A stream of bits: code i takes bits i * bits and up, lowest first, and may cross a byte.
    """
    eights = codes.unflatten(-1, (-1, 8)).unbind(-1)
    words = torch.zeros(eights[0].shape, dtype=torch.int64)
    for place, code in enumerate(eights):
        words |= code.long() << (place * bits)
    return words.unsqueeze(-1).view(torch.uint8)[..., :bits].flatten(-2)


def unpack_dense(data: Tensor, bits: int) -> Tensor:
    """The inverse of `pack_dense`."""
    runs = data.unflatten(-1, (-1, bits))
    words = torch.zeros(*runs.shape[:-1], 8, dtype=torch.uint8)
    words[..., :bits] = runs
    wide = words.view(torch.int64)
    return torch.cat([((wide >> (place * bits)) & (2**bits - 1)).to(torch.uint8) for place in range(8)], -1).flatten(-2)


def half_bytes(halves: Tensor) -> Tensor:
    """float16 (...,) to uint8 (..., 2)."""
    return halves.contiguous().unsqueeze(-1).view(torch.uint8)


def read_halves(data: Tensor) -> Tensor:
    """uint8 (..., 2) to float16 (...,)."""
    low, high = data.short().unbind(-1)
    return (low | high << 8).view(torch.float16)
