"""Parts of anyfit with something left out, and one with something more: what `ablation.py` measures."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from anyfit.calibration.statistics import InputStatistics
from anyfit.formats import fitting_line, formats
from anyfit.formats.base import Format, GridFormat, Scales
from anyfit.formats.integer import IntegerFormat
from anyfit.quantizers import gptq
from anyfit.quantizers.base import Encoded
from anyfit.quantizers.rtn import RoundToNearest

PAPER_DAMPING = 0.01
NUM_SCALES = 24
"""Tried by `EveryZeroPoint` with each."""
NUDGES = (0.5, -0.5, 0.25, -0.25)
"""Tried by `ScalesAround`: steps of the grid by which its end is moved."""


class Blind(RoundToNearest):
    """Plain rounding with scales of least squared error of the weights."""

    def prepare(self, statistics: InputStatistics, formats: Iterable[Format] = ()) -> InputStatistics:
        return InputStatistics.unknown(len(statistics.hessian))


@dataclass
class PlainGPTQ(gptq.GPTQ):
    """GPTQ in the format's grid, by default as near to the paper as that allows; for formats that code each column by itself.

    `ordered`: columns by falling mean square within their spans. `compensated`: scales are fitted with the geometric mean of
    H_jj and 1 / U_jj² in place of H_jj. `passes`: of coarse grids.
    """

    damping: float = PAPER_DAMPING
    ordered: bool = False
    compensated: bool = False
    passes: int = 1

    def prepare(self, statistics: InputStatistics, formats: Iterable[Format] = ()) -> gptq.Factorised:
        diagonal, hessian = statistics.diagonal, statistics.hessian.double().clone()
        dead = diagonal == 0
        hessian.diagonal()[dead] = 1
        damping = self.damping * hessian.diagonal().mean()
        hessian.diagonal().add_(damping)
        order = gptq.column_order(diagonal) if self.ordered else torch.arange(len(diagonal))
        inverse = torch.linalg.inv(hessian[order][:, order])
        upper = torch.linalg.cholesky(inverse, upper=True).float()
        importance = diagonal.clone()
        if self.compensated:
            importance[order] = (diagonal[order] * upper.diagonal().pow(-2)).sqrt()
        factor = gptq.Factor(order, upper, (dead + damping).float()[order], 1 / upper.diagonal()[:, None, None])
        return gptq.Factorised(statistics, {1: factor}, importance, dead, ())

    def encode(self, weight: Tensor, prepared: gptq.Factorised, format_: GridFormat) -> Encoded:
        with patch.object(gptq, "COARSE_PASSES", self.passes):
            return super().encode(weight, prepared, format_)


class OwnZeroPoint(IntegerFormat):
    """Two-bit integers with a zero point, whose neighbours are not looked at."""

    def __init__(self) -> None:
        super().__init__(2, "asym")

    def fit(self, weight: Tensor, importance: Tensor) -> Scales:
        with patch.object(fitting_line, "NEIGHBOURS", ()):
            return super().fit(weight, importance)


class MoreGrids(OwnZeroPoint, ABC):
    """The best of several grids for each group, their scales improved by least squares."""

    @abstractmethod
    def grids(self, weight: Tensor, importance: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Scales and zero points, (rows, groups) each."""

    def fit(self, weight: Tensor, importance: Tensor) -> Scales:
        groups = weight.unflatten(1, (-1, self.group))
        counted = importance.clamp_min(1e-6 * float(importance.mean())).view(-1, self.group)
        least = torch.full(groups.shape[:2], torch.inf)
        best_scale, best_zero = torch.zeros_like(least), torch.zeros_like(least)
        for start, zero in self.grids(weight, importance):
            scale = self._improved(groups, counted, start, zero)
            error = (counted * (groups - scale[..., None] * (self._codes(groups, scale, zero) - zero[..., None])) ** 2).sum(2)
            better = error < least
            least, best_scale = torch.where(better, error, least), torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
        return self.assemble({"scale": best_scale.half(), "zero": best_zero.to(torch.uint8)})

    def _codes(self, groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (groups * torch.where(scale == 0, 0, 1 / scale)[..., None] + zero[..., None]).round().clamp(0, 3)

    def _improved(self, groups: Tensor, counted: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The best scale for the codes that `scale` gives, as it is stored."""
        levels = self._codes(groups, scale, zero) - zero[..., None]
        squares = (counted * levels**2).sum(2)
        fitted = torch.where(squares > 0, (counted * levels * groups).sum(2) / squares, scale)
        return fitted.clamp_min(0).half().float()


class ScalesAround(MoreGrids):
    """The product's zero points, with scales around the product's."""

    def grids(self, weight: Tensor, importance: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        asymmetric = formats.get("int2_asym")
        assert isinstance(asymmetric, GridFormat)
        found = asymmetric.fit(weight, importance)
        for nudge in (0.0, *NUDGES):
            yield found.scale * (1 + nudge / 3), found.stored["zero"].float()


class EveryZeroPoint(MoreGrids):
    """Each of the four zero points, with many scales."""

    def grids(self, weight: Tensor, importance: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        largest = weight.unflatten(1, (-1, self.group)).abs().amax(2)
        for zero, part in product(range(4), np.geomspace(0.15, 1.1, NUM_SCALES)):
            yield part * largest, torch.full_like(largest, zero)
