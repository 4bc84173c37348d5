"""The search for scales of grids without offsets."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from anyfit.formats.fitting import Best, Columns, Snap, best_multiple, to_half


@dataclass(frozen=True)
class ScaleSearch:
    """Where to look for the scale of a group.

    `reach`: the largest level. `clipped`: levels beyond it that the group's largest magnitude may fall on and
    be clipped from (negative: levels that stay unused), each tried with each of `signs` (-1: the grid
    reversed). `nudges`: changes of the best scale, in levels at the end of the grid.
    """

    snap: Snap
    reach: float
    clipped: tuple[float, ...] = (-1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4.5)
    nudges: tuple[float, ...] = (0.3, -0.3, 0.15, -0.15)
    signs: tuple[int, ...] = (1, -1)

    def ideal(self, columns: Columns) -> Tensor:
        """The best scale found for each group, (groups, rows), not rounded."""
        peak = columns.values.abs().amax(0)
        best = Best(torch.zeros_like(peak), torch.zeros_like(peak))

        def offer(scale: Tensor) -> None:
            best.offer(*best_multiple(columns, columns.levels(self.snap, scale)))

        for clipped, sign in product(self.clipped, self.signs):
            offer(peak * (sign / (self.reach + clipped)))
        for nudge in self.nudges:
            offer(best.parts[0] * (1 + nudge / self.reach))
        return best.parts[0]

    def half(self, columns: Columns) -> tuple[Tensor]:
        """The half of least error as stored for each group, (groups, rows) float32."""
        half = to_half(self.ideal(columns))
        best = Best(columns.error(self.snap, half), half)
        for _ in range(2):
            half = to_half(best_multiple(columns, columns.levels(self.snap, best.parts[0]))[1])
            best.offer(columns.error(self.snap, half), half)
        return (best.parts[0],)


def power_of_two(columns: Columns, snap: Snap, lowest: int, highest: int) -> Tensor:
    """The exponent e, within bounds, whose scale 2**e has the least error, (groups, rows) int32.

    For levels up to 12. Both bounds and the sums with 6 are exponents of normal float32 numbers.
    """
    peak = columns.values.abs().amax(0)
    top = peak.frexp().exponent.clamp(lowest + 4, highest + 3)
    # Powers of two are exact: with the peak near 1, no square can under- or overflow.
    near_one = Columns(columns.values * exp2(-top), columns.weights)
    best = Best(torch.full_like(peak, torch.inf), top)
    for step in (-6, -5, -4, -3):
        exponent = (top + step).clamp(lowest, highest)
        best.offer(near_one.error(snap, exp2(exponent - top)), exponent)
    return best.parts[0]


def exp2(exponent: Tensor) -> Tensor:
    """2**exponent, exact, for int32 exponents of normal float32 numbers."""
    return ((exponent + 127) << 23).view(torch.float32)
