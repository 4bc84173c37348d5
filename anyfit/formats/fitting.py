"""The search for scales, shared by all grid formats.

Every fit minimises, for each row by itself, the sum over the columns of importance * (weight - value)², where
the values are what plain rounding gives on the grid *as it will be stored*: halves are rounded to halves and
sub-scales to their integers before a code is chosen. The error jumps wherever a weight moves to another code,
so there is no formula for the best scale. Candidates are tried: a few that clip the extremes more or less,
each improved by the weighted least-squares scale of the codes that it gives, then neighbours of the best one.

Inside, tensors are (group, groups, rows): columns of one group come first. Sums over a group are then sums of
whole rows of memory, added pairwise in a fixed order, so that a row's result is the same to the bit whatever
other rows it is fitted with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.core.errors import UserError

HALF_MAX = 65504.0
HALF_TINY = 2.0**-24
FLOAT_TINY = 2.0**-126
CHUNK = 2**17
"""Weights fitted at a time: a temporary of this size stays in the processor's cache."""

Snap = Callable[[Tensor], Tensor]
"""Numbers, which may be changed in place, to the nearest levels."""


@dataclass(frozen=True)
class Columns:
    """One span: `values` (group, groups, rows) and `weights` of their squared errors (group, groups, 1)."""

    values: Tensor
    weights: Tensor

    def error(self, snap: Snap, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """Weighted squared error of rounding on the grid `scale * level - offset`, (groups, rows)."""
        rounded = self.levels(snap, scale, offset).mul_(scale)
        if offset is not None:
            rounded -= offset
        return fold(rounded.sub_(self.values).square_().mul_(self.weights))

    def levels(self, snap: Snap, scale: Tensor, offset: Tensor | None = None) -> Tensor:
        """The levels that the values round to, (group, groups, rows)."""
        target = self.values * inverse(scale) if offset is None else (self.values + offset).mul_(inverse(scale))
        return snap(target)


class Best:
    """For each group, or each row, the candidate of least error so far, and what it was made of."""

    def __init__(self, error: Tensor, *parts: Tensor) -> None:
        self.error, self.parts = error, parts

    def offer(self, error: Tensor, *parts: Tensor) -> None:
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.parts = tuple(torch.where(better, new, old) for new, old in zip(parts, self.parts, strict=True))


def fold(summands: Tensor) -> Tensor:
    """Sum over dimension 0, whose length is a power of two, by halves."""
    while len(summands) > 1:
        middle = len(summands) // 2
        summands = summands[:middle] + summands[middle:]
    return summands[0]


def inverse(scale: Tensor) -> Tensor:
    """1 / scale, and 0 where that would not be finite."""
    return torch.where(scale.abs() < FLOAT_TINY, 0, 1 / scale)


def to_half(number: Tensor) -> Tensor:
    """The nearest finite half as float32; what isn't zero stays so, in order that tiny weights keep a scale."""
    half = number.clamp(-HALF_MAX, HALF_MAX).half().float()
    return torch.where((half == 0) & (number != 0), number.sign() * HALF_TINY, half)


def whole(low: int, high: int) -> Snap:
    """Rounding to the whole numbers `low` to `high`."""
    return lambda target: target.round_().clamp_(low, high)


def listed(levels: Tensor) -> Snap:
    """Rounding to any list of whole numbers."""
    ordered = levels.unique()
    # The borders between them are multiples of a half, so within a cell of that width all numbers round alike.
    cells = torch.arange(2 * int(ordered[0]), 2 * int(ordered[-1])) / 2 + 0.25
    table = ordered[torch.bucketize(cells, (ordered[1:] + ordered[:-1]) / 2)]

    def snap(target: Tensor) -> Tensor:
        cell = target.sub_(ordered[0]).mul_(2).clamp_(0, len(table) - 1).int()
        return table.index_select(0, cell.flatten()).view_as(cell)

    return snap


def fit_rows(fit: Callable[[Columns], tuple[Tensor, ...]], weight: Tensor, importance: Tensor, group: int) -> tuple[Tensor, ...]:
    """Apply `fit` to a few rows of a span at a time and join its answers, (groups or 1, rows), as (rows, groups or 1)."""
    weights = _error_weights(importance).reshape(-1, group).T.unsqueeze(-1).contiguous()
    answers = []
    for rows in weight.split(max(1, CHUNK // weight.shape[1])):
        values = rows.T.reshape(-1, group, len(rows)).transpose(0, 1).contiguous()
        answers.append(fit(Columns(values, weights)))
    return tuple(torch.cat(parts, 1).T.contiguous() for parts in zip(*answers, strict=True))


def _error_weights(importance: Tensor) -> Tensor:
    """Mean 1, so that nothing overflows, and never zero, so that columns whose input is dead keep sane codes."""
    importance = importance.contiguous()  # a strided mean sums in another order
    mean = importance.mean()
    if mean == 0:
        return torch.ones_like(importance)
    return (importance / mean).clamp_min(1e-6)


def best_multiple(columns: Columns, level: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted least-squares scale of these levels, (groups, rows), after its error.

    The error is counted from that of all zeros, so it is never positive.
    """
    weighted = level * columns.weights
    along = fold(weighted * columns.values)
    scale = along * inverse(fold(weighted.mul_(level)))
    return -along * scale, scale


def refuse_beyond(name: str, largest: float, weight: Tensor) -> None:
    """Raise `UserError` where a weight is larger than the format's largest scale can reach."""
    peak = weight.abs().max().item() if weight.numel() else 0.0
    if not peak <= largest:
        raise UserError(
            f"A weight of magnitude {peak:.4g} is beyond {largest:.4g}, the largest that {name} can hold.",
            remedy="Keep this matrix in BF16 or F32.",
        )
