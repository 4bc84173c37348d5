"""Plain integers of 2 to 8 bits, in groups of 32 columns with a half-precision scale each.

Symmetric: value = scale * q, with q in the full range -2^(b-1) to 2^(b-1) - 1. The scale may be negative, so
that the largest weight can take the longer side. Asymmetric: value = scale * (q - zero), with q and the whole
zero point from 0 to 2^b - 1.

A row in bytes: for each group its scale (2), its zero point where there is one (1), then its 32 codes as a
dense stream of bits (4 * b), lowest bits first: b 32-bit words, which is what runtimes call a packed group.
Codes are stored unsigned, symmetric ones as q + 2^(b-1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyfit.formats.base import GridFormat, Scales
from anyfit.formats.fields import half_bytes, pack_dense, read_halves, unpack_dense
from anyfit.formats.fitting import HALF_MAX, fit_rows, refuse_beyond, whole
from anyfit.formats.fitting_line import LineSearch
from anyfit.formats.fitting_scale import ScaleSearch


class IntegerFormat(GridFormat):
    """`num_bits` integers, `symmetric` or with a zero point for each group."""

    block = group = 32

    def __init__(self, num_bits: int, *, symmetric: bool) -> None:
        self.name = f"int{num_bits}_{'sym' if symmetric else 'asym'}"
        self.num_bits, self.symmetric = num_bits, symmetric
        lowest = -(2 ** (num_bits - 1)) if symmetric else 0
        self.levels = torch.arange(lowest, lowest + 2**num_bits, dtype=torch.float32)

    @property
    def bits(self) -> float:
        return self.num_bits + (16 if self.symmetric else 24) / self.group

    def fit(self, weight: Tensor, importance: Tensor) -> Scales:
        reach = 2 ** (self.num_bits - 1)
        refuse_beyond(self.name, HALF_MAX * reach, weight)
        if self.symmetric:
            (scale,) = fit_rows(ScaleSearch(whole(-reach, reach - 1), reach).half, weight, importance, self.group)
            return Scales(scale, torch.zeros_like(scale), {"scale": scale.half()})
        scale, zero = fit_rows(_line_search(self.num_bits).zero_point, weight, importance, self.group)
        return Scales(scale, scale * zero, {"scale": scale.half(), "zero": zero.to(torch.uint8)})

    def pack(self, codes: Tensor, scales: Scales) -> Tensor:
        parts = [half_bytes(scales.stored["scale"])]
        if not self.symmetric:
            parts.append(scales.stored["zero"].unsqueeze(-1))
        parts.append(pack_dense(codes.unflatten(1, (-1, self.group)), self.num_bits))
        return torch.cat(parts, -1).flatten(1)

    def unpack(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes uint8 (rows, columns), scales float16 and zero points uint8 (rows, groups); None if symmetric."""
        head = 2 if self.symmetric else 3
        groups = data.unflatten(1, (-1, head + 4 * self.num_bits))
        codes = unpack_dense(groups[..., head:], self.num_bits).flatten(1)
        zero = None if self.symmetric else groups[..., 2]
        return codes, read_halves(groups[..., :2]), zero

    def read(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, half, zero = self.unpack(data)
        scale = half.float()
        return codes, scale, torch.zeros_like(scale) if zero is None else scale * zero.float()


def _line_search(num_bits: int) -> LineSearch:
    if num_bits == 2:
        clips: tuple[float, ...] = (1.0, 0.85, 0.7, 0.5)
    else:
        clips = (1.02, 0.95, 0.85, 0.65) if num_bits <= 4 else (1.01, 0.97, 0.9)
    return LineSearch(2**num_bits - 1, clips, (0.5, -0.5, 0.25, -0.25), positive=True)


int2_sym, int3_sym, int4_sym, int5_sym, int6_sym, int7_sym, int8_sym = (IntegerFormat(bits, symmetric=True) for bits in range(2, 9))
int2_asym, int3_asym, int4_asym, int5_asym, int6_asym, int7_asym, int8_asym = (IntegerFormat(bits, symmetric=False) for bits in range(2, 9))
