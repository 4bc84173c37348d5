"""Scales in two levels: one half for a span of columns, times a small whole number for each group in it.

The half and the whole numbers are chosen together. Each group starts from the scale and offset that are best
for it alone. Several halves are tried, each with the whole numbers nearest to those. Then every group tries
the neighbours of its numbers, the halves are fitted anew by least squares to all codes of the span, and the
neighbours are tried again. A step is kept where the error as stored is smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.formats.fitting import Best, Columns, Snap, fold, inverse, to_half


@dataclass(frozen=True)
class TwoLevel:
    """What a span can store: levels, and for each group a number from `low` to `high` for its scale.

    `divisors`: the numbers that the span's largest scale (and offset) is tried as. `moves`: changes of a
    group's numbers (scale's, offset's), tried one after another. `with_offset`: a second half and second numbers,
    from 0 to `high`, make offsets.
    """

    snap: Snap
    low: int
    high: int
    divisors: tuple[int, ...]
    moves: tuple[tuple[int, int], ...]
    with_offset: bool

    def fit(self, columns: Columns, scale: Tensor, offset: Tensor | None = None) -> tuple[Tensor, ...]:
        """What is stored, near the groups' own `scale` and `offset`, (groups, rows).

        The scales' halves (1, rows) and numbers (groups, rows), then the offsets' where there are any.
        """
        half, number = self._first_half(columns, scale, offset)
        zero = torch.zeros_like(number)
        offsets = (zero[0], zero) if offset is None else self._first_offset_half(columns, half * number, offset)
        half, number, offset_half, offset_number = self._settle(columns, half, number, *offsets)
        return (half[None], number, offset_half[None], offset_number) if self.with_offset else (half[None], number)

    def _first_half(self, columns: Columns, scale: Tensor, offset: Tensor | None) -> tuple[Tensor, Tensor]:
        peak = _largest(scale)
        best = Best(torch.full_like(peak, torch.inf), peak, scale)
        for divisor in self.divisors:
            half = to_half(peak / divisor)
            number = (scale * inverse(half)).round().clamp(self.low, self.high)
            best.offer(fold(columns.error(self.snap, half * number, offset)), half, number)
        return best.parts[0], best.parts[1]

    def _first_offset_half(self, columns: Columns, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Offsets are first fitted anew to the scales, which are those stored by now."""
        excess = columns.levels(self.snap, scale, offset).mul_(scale).sub_(columns.values).mul_(columns.weights)
        offset = (fold(excess) / fold(columns.weights)).clamp_min_(0)
        peak = _largest(offset)
        best = Best(torch.full_like(peak, torch.inf), peak, offset)
        for divisor in self.divisors:
            half = to_half(peak / divisor)
            number = (offset * inverse(half)).round().clamp(0, self.high)
            best.offer(fold(columns.error(self.snap, scale, half * number)), half, number)
        return best.parts[0], best.parts[1]

    def _settle(self, columns: Columns, half: Tensor, number: Tensor, offset_half: Tensor, offset_number: Tensor) -> tuple[Tensor, ...]:
        """Climb, fit both halves to the codes, climb again; row by row the better of the two."""
        error, number, offset_number = self._climb(columns, half, number, offset_half, offset_number)
        best = Best(fold(error), half, number, offset_half, offset_number)
        half, offset_half = self._refit_halves(columns, *best.parts)
        error, number, offset_number = self._climb(columns, half, number, offset_half, offset_number)
        best.offer(fold(error), half, number, offset_half, offset_number)
        return best.parts

    def _climb(
        self, columns: Columns, half: Tensor, number: Tensor, offset_half: Tensor, offset_number: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Error of each group and its numbers, after each has tried its neighbours."""

        def error(number: Tensor, offset_number: Tensor) -> Tensor:
            return columns.error(self.snap, half * number, offset_half * offset_number if self.with_offset else None)

        best = Best(error(number, offset_number), number, offset_number)
        for move, offset_move in self.moves:
            number, offset_number = best.parts
            moved = (number + move).clamp(self.low, self.high), (offset_number + offset_move).clamp(0, self.high)
            best.offer(error(*moved), *moved)
        number, offset_number = best.parts
        return best.error, number, offset_number

    def _refit_halves(
        self, columns: Columns, half: Tensor, number: Tensor, offset_half: Tensor, offset_number: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted least-squares halves of a span for its codes: two unknowns, (rows,) each."""
        level = columns.levels(self.snap, half * number, offset_half * offset_number)
        weighted = level * columns.weights
        value = fold(number * fold(weighted * columns.values))
        mixed = fold(number * offset_number * fold(weighted))
        square = fold(number * number * fold(weighted.mul_(level)))
        offset_square = fold(offset_number * offset_number * fold(columns.weights))
        offset_value = fold(offset_number * fold(columns.values * columns.weights))
        determinant = square * offset_square - mixed * mixed
        solvable = determinant > 1e-6 * square * offset_square
        over = torch.where(solvable, 1 / determinant, 0)
        scale = torch.where(solvable, (value * offset_square - mixed * offset_value) * over, value * inverse(square))
        offset = (mixed * value - square * offset_value) * over
        return to_half(scale), to_half(offset)


def _largest(numbers: Tensor) -> Tensor:
    """Of each row's numbers, (groups, rows), the one of largest magnitude with its sign."""
    at = numbers.abs().argmax(0, keepdim=True)
    return numbers.gather(0, at)[0]
