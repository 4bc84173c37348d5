"""The search for scales, shared by all grid formats.

Every fit minimises, for each row by itself, the sum over the columns of importance * (weight - value)², where
the values are what plain rounding gives on the grid *as it will be stored*: halves are rounded to halves and
sub-scales to their integers before a code is chosen. The error jumps wherever a weight moves to another code,
so there is no formula for the best scale. Candidates are tried: a few that clip the extremes more or less,
each improved by the weighted least-squares scale of the codes that it gives, then neighbours of the best one.

A search is a few numbers in a frozen dataclass; its loops are compiled, see `fitting_lanes`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anyfit.core.errors import UserError
from anyfit.formats.fitting_lanes import LANES, Floats, to_tiles
from anyfit.formats.threads import each

HALF_MAX = 65504.0
CHUNK = 2**17
"""Weights fitted at a time: a copy of this size stays in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Snap:
    """Rounding to levels from `low` to `high`: whole numbers, or where there is a `table`, its entry for each half step."""

    low: float
    high: float
    table: Floats

    @property
    def compiled(self) -> tuple[np.float32, np.float32, Floats]:
        """What compiled functions take."""
        return np.float32(self.low), np.float32(self.high), self.table


def whole(low: int, high: int) -> Snap:
    """Rounding to the whole numbers `low` to `high`."""
    return Snap(low, high, np.empty(0, np.float32))


def listed(levels: Tensor) -> Snap:
    """Rounding to any list of whole numbers."""
    ordered = levels.unique()
    # The borders between them are multiples of a half, so within a cell of that width all numbers round alike.
    cells = torch.arange(2 * int(ordered[0]), 2 * int(ordered[-1]) + 1) / 2 + 0.25
    table = ordered[torch.bucketize(cells, (ordered[1:] + ordered[:-1]) / 2)]
    return Snap(float(ordered[0]), float(ordered[-1]), table.numpy())


@dataclass(frozen=True)
class Columns:
    """Some rows of one span: `values` (tiles, groups, group, LANES), rows of zeros last to fill a tile, and the
    `weights` of their squared errors (groups, group)."""

    values: Floats
    weights: Floats

    @classmethod
    def of(cls, weight: Tensor, weights: Tensor, group: int) -> Columns:
        """From `weight` (rows, columns) and `weights` (columns,)."""
        rows, columns = weight.shape
        values = np.empty((-(-rows // LANES), columns, LANES), np.float32)
        to_tiles(weight.contiguous().numpy(), values)
        return cls(values.reshape(-1, columns // group, group, LANES), weights.view(-1, group).numpy())


def fit_rows(fit: Callable[[Columns], tuple[NDArray[Any], ...]], weight: Tensor, importance: Tensor, group: int) -> tuple[Tensor, ...]:
    """Apply `fit` to a few rows of a span at a time and join its answers, (groups or 1, rows), as (rows, groups or 1)."""
    assert weight.shape[1] % group == 0, f"{weight.shape[1]} columns are no whole groups of {group}"
    weight, weights = weight.detach(), error_weights(importance)
    most = max(1, CHUNK // weight.shape[1])
    answers: dict[int, list[Tensor]] = {}

    def some(rows: slice) -> None:
        parts = fit(Columns.of(weight[rows], weights, group))
        answers[rows.start] = [torch.from_numpy(part)[:, : rows.stop - rows.start] for part in parts]

    each(some, len(weight), min(LANES, most), most)
    ordered = [answers[start] for start in sorted(answers)]
    return tuple(torch.cat(parts, 1).T.contiguous() for parts in zip(*ordered, strict=True))


def numbers(some: tuple[float, ...]) -> Floats:
    """A setting of a search as compiled functions take it."""
    return np.array(some, np.float32)


def error_weights(importance: Tensor) -> Tensor:
    """Mean 1, so that nothing overflows, and never zero, so that columns whose input is dead keep sane codes."""
    importance = importance.contiguous()  # a strided mean sums in another order
    mean = importance.mean()
    if mean == 0:
        return torch.ones_like(importance)
    return (importance / mean).clamp_min(1e-6)


def refuse_beyond(name: str, largest: float, weight: Tensor) -> None:
    """Raise `UserError` where a weight is larger than the format's largest scale can reach."""
    lowest, highest = weight.aminmax() if weight.numel() else (torch.zeros(()), torch.zeros(()))
    peak = max(-lowest.item(), highest.item())
    if not peak <= largest:
        raise UserError(
            f"A weight of magnitude {peak:.4g} is beyond {largest:.4g}, the largest that {name} can hold.",
            remedy="Keep this matrix in BF16 or F32.",
        )
