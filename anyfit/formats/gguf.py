"""The GGUF types with one level of scales: a half, or a power of two, for each 32 columns (TQ2_0: 256)."""

from __future__ import annotations

import torch
from torch import Tensor

from anyfit.formats.base import Scales
from anyfit.formats.fields import half_bytes, read_halves
from anyfit.formats.fitting import HALF_MAX, fit_rows, listed, refuse_beyond, whole
from anyfit.formats.fitting_line import LineSearch
from anyfit.formats.fitting_scale import ScaleSearch, power_of_two
from anyfit.formats.gguf_blocks import BlockFormat, Layout, Parts, counting


class HalfScaled(BlockFormat):
    """Value = d * level."""

    scale_half = "d"

    def __init__(self, name: str, levels: Tensor, layout: Layout, search: ScaleSearch) -> None:
        super().__init__(name, levels, layout.block, layout)
        self.search = search

    def fit(self, weight: Tensor, importance: Tensor) -> Scales:
        refuse_beyond(self.name, HALF_MAX * self.search.reach, weight)
        (scale,) = fit_rows(self.search.half, weight, importance, self.group)
        return Scales(scale, torch.zeros_like(scale), {"d": scale.half()})

    def pack_scales(self, stored: Parts) -> Parts:
        return {"d": half_bytes(stored["d"]).flatten(2)}

    def read_scales(self, parts: Parts) -> Parts:
        return {"d": read_halves(parts["d"])}

    def grids(self, stored: Parts) -> tuple[Tensor, Tensor]:
        scale = stored["d"].float()
        return scale, torch.zeros_like(scale)


class HalfLine(BlockFormat):
    """Value = d * level + m."""

    scale_half, offset_half = "d", "m"

    def __init__(self, name: str, layout: Layout, search: LineSearch) -> None:
        super().__init__(name, counting(0, search.top), layout.block, layout)
        self.search = search

    def fit(self, weight: Tensor, importance: Tensor) -> Scales:
        refuse_beyond(self.name, HALF_MAX, weight)
        scale, offset = fit_rows(self.search.halves, weight, importance, self.group)
        return Scales(scale, offset, {"d": scale.half(), "m": -offset.half()})

    def pack_scales(self, stored: Parts) -> Parts:
        return {key: half_bytes(part).flatten(2) for key, part in stored.items()}

    def read_scales(self, parts: Parts) -> Parts:
        return {key: read_halves(parts[key]) for key in ("d", "m")}

    def grids(self, stored: Parts) -> tuple[Tensor, Tensor]:
        return stored["d"].float(), -stored["m"].float()


class PowerScaled(BlockFormat):
    """Value = 2**(e - 128) * level, for levels up to 12."""

    # Scales are kept to normal numbers whose inverse is finite and whose largest value is.
    lowest, highest = -126, 123

    def fit(self, weight: Tensor, importance: Tensor) -> Scales:
        refuse_beyond(self.name, 12 * 2.0**self.highest, weight)
        snap = listed(self.levels)
        (exponent,) = fit_rows(lambda columns: (power_of_two(columns, snap, self.lowest, self.highest),), weight, importance, self.group)
        stored = (exponent + 128).to(torch.uint8)
        scale = _half_of_power(stored)
        return Scales(scale, torch.zeros_like(scale), {"e": stored})

    def pack_scales(self, stored: Parts) -> Parts:
        return stored

    def read_scales(self, parts: Parts) -> Parts:
        return {"e": parts["e"]}

    def grids(self, stored: Parts) -> tuple[Tensor, Tensor]:
        scale = _half_of_power(stored["e"])
        return scale, torch.zeros_like(scale)


def _half_of_power(stored: Tensor) -> Tensor:
    """2**(e - 128) of uint8 e, exact; the two smallest are subnormal."""
    exponent = stored.int()
    return torch.where(exponent < 2, 0x200000 << exponent.clamp(max=1), (exponent - 1) << 23).view(torch.float32)


_NIBBLES, _FIVE_BITS = {"qs": (4, 16)}, {"qs": (4, 16), "qh": (1, 1)}
_NON_LINEAR = torch.tensor([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.float32)
# The four-bit floats of the OCP Microscaling specification, doubled: ggml halves the scale instead.
_TWICE_E2M1 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.float32)

Q8_0 = HalfScaled("Q8_0", counting(-128, 127), Layout(32, {"d": 2, "qs": 32}, {"qs": (8, 1)}, signed=True), ScaleSearch.integers(8))
Q5_0 = HalfScaled("Q5_0", counting(-16, 15), Layout(32, {"d": 2, "qh": 4, "qs": 16}, _FIVE_BITS), ScaleSearch.integers(5))
Q4_0 = HalfScaled("Q4_0", counting(-8, 7), Layout(32, {"d": 2, "qs": 16}, _NIBBLES), ScaleSearch.integers(4))
Q5_1 = HalfLine(
    "Q5_1",
    Layout(32, {"d": 2, "m": 2, "qh": 4, "qs": 16}, _FIVE_BITS),
    LineSearch.integers(5, positive=False),
)
Q4_1 = HalfLine(
    "Q4_1",
    Layout(32, {"d": 2, "m": 2, "qs": 16}, _NIBBLES),
    LineSearch.integers(4, positive=False),
)
# Neighbouring levels are about twelve apart.
IQ4_NL = HalfScaled(
    "IQ4_NL",
    _NON_LINEAR,
    Layout(32, {"d": 2, "qs": 16}, _NIBBLES),
    ScaleSearch(listed(_NON_LINEAR), 127, (-30, -20, -12, 0, 14, 35), (4, -4)),
)
MXFP4 = PowerScaled("MXFP4", _TWICE_E2M1, 32, Layout(32, {"e": 1, "qs": 16}, _NIBBLES))
# With three levels the scale to try is a threshold: half of it separates zero from one.
TQ2_0 = HalfScaled(
    "TQ2_0",
    counting(-1, 1),
    Layout(256, {"qs": 64, "d": 2}, {"qs": (2, 32)}),
    ScaleSearch(whole(-1, 1), 1, tuple(1.15**i - 1 for i in range(-4, 22)), (0.05, -0.05), signs=(1,)),
)
