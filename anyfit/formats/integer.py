"""Plain integers of 2 to 8 bits, in groups of 32 (64, 128) columns with a half-precision scale each.

- `sym`: value = scale * q, with q in the full range -2^(b-1) to 2^(b-1) - 1. The scale may be negative, so that the
  largest weight can take the longer side.
- `asym`: value = scale * (q - zero), with q and the whole zero point from 0 to 2^b - 1.
- `offset`: the same with a zero point that needn't be whole, so that it can be trained; it starts whole, and is a multiple of
  1/256, as then scale * q - scale * zero is the same number in float32 whatever the order of the operations.

A row in bytes: for each group its scale (2), its zero point (1, as a half 2, none if symmetric), then its codes as a dense
stream of bits, lowest bits first: b 32-bit words for each 32 codes, which is what runtimes call a packed group.
Codes are stored unsigned, symmetric ones as q + 2^(b-1). Halves of zero points are stored less 2^(b-1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyfit.formats import INTEGER_GROUPS, INTEGER_KINDS
from anyfit.formats.base import GridFormat, Scales
from anyfit.formats.fields import half_bytes, pack_dense, read_halves, unpack_dense
from anyfit.formats.fitting import HALF_MAX, fit_rows, refuse_beyond
from anyfit.formats.fitting_line import LineSearch
from anyfit.formats.fitting_scale import ScaleSearch

ZERO_STEPS = 256
"""Steps of a zero point that needn't be whole, in a step of the integers."""
_ZERO_BYTES = {"sym": 0, "asym": 1, "offset": 2}


class IntegerFormat(GridFormat):
    """`num_bits` integers of a `kind`, see above."""

    scale_half = "scale"

    def __init__(self, num_bits: int, kind: str, group: int = 32) -> None:
        self.name = f"int{num_bits}_{kind}{INTEGER_GROUPS[group]}"
        self.num_bits, self.kind, self.symmetric = num_bits, kind, kind == "sym"
        self.block = self.group = group
        self.offset_half = None if self.symmetric else "scale"
        lowest = -(2 ** (num_bits - 1)) if self.symmetric else 0
        self.levels = torch.arange(lowest, lowest + 2**num_bits, dtype=torch.float32)

    @property
    def bits(self) -> float:
        return self.num_bits + 8 * (2 + _ZERO_BYTES[self.kind]) / self.group

    def fit(self, weight: Tensor, importance: Tensor) -> Scales:
        refuse_beyond(self.name, HALF_MAX * 2 ** (self.num_bits - 1), weight)
        if self.symmetric:
            (scale,) = fit_rows(ScaleSearch.integers(self.num_bits).half, weight, importance, self.group)
            return Scales(scale, torch.zeros_like(scale), {"scale": scale.half()})
        scale, zero = fit_rows(LineSearch.integers(self.num_bits, positive=True).zero_point, weight, importance, self.group)
        return self.assemble({"scale": scale.half(), "zero": zero if self.kind == "offset" else zero.to(torch.uint8)})

    def zero_of(self, scale: Tensor, offset: Tensor) -> Tensor:
        """The zero point, float32, of a kind that needn't be whole, nearest to these offsets."""
        zero = torch.where(scale == 0, 0, offset / scale).clamp_(0, len(self.levels) - 1)
        return (zero * ZERO_STEPS).round_() / ZERO_STEPS

    def assemble(self, stored: dict[str, Tensor]) -> Scales:
        scale = stored["scale"].float()
        return Scales(scale, torch.zeros_like(scale) if self.symmetric else scale * stored["zero"].float(), stored)

    def pack(self, codes: Tensor, scales: Scales) -> Tensor:
        parts = [half_bytes(scales.stored["scale"])]
        if self.kind == "offset":
            parts.append(half_bytes((scales.stored["zero"] - 2 ** (self.num_bits - 1)).half()))
        elif not self.symmetric:
            parts.append(scales.stored["zero"].unsqueeze(-1))
        parts.append(pack_dense(codes.unflatten(1, (-1, self.group)), self.num_bits))
        return torch.cat(parts, -1).flatten(1)

    def unpack(self, data: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Codes uint8 (rows, columns), scales float16 and zero points (rows, groups), uint8 or float32; None if symmetric."""
        head = 2 + _ZERO_BYTES[self.kind]
        groups = data.unflatten(1, (-1, head + self.group // 8 * self.num_bits))
        codes = unpack_dense(groups[..., head:], self.num_bits).flatten(1)
        zero = None if self.symmetric else groups[..., 2]
        if self.kind == "offset":
            zero = read_halves(groups[..., 2:4]).float() + 2 ** (self.num_bits - 1)
        return codes, read_halves(groups[..., :2]), zero

    def read(self, data: Tensor) -> tuple[Tensor, Scales]:
        codes, half, zero = self.unpack(data)
        return codes, self.assemble({"scale": half} if zero is None else {"scale": half, "zero": zero})


BY_NAME = {
    format_.name: format_
    for group in INTEGER_GROUPS
    for kind, all_bits in INTEGER_KINDS.items()
    for format_ in (IntegerFormat(bits, kind, group) for bits in all_bits)
}
globals().update(BY_NAME)
