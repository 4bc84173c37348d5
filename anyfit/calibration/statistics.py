"""What the calibration pass leaves of one distinct input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.calibration.spread import Spread

DAMPING = 0.05
"""Part of the mean diagonal that is added to second moments before they are inverted."""


@dataclass(frozen=True)
class InputStatistics:
    """Second moments of the vectors x that a group of matrices multiplies.

    `hessian`: mean of x xᵀ, (columns, columns) float32, symmetric. `count`: how many vectors were seen. `spread`: how large their numbers
    are, where somebody asked.
    """

    hessian: Tensor
    count: int
    spread: Spread | None = None

    @classmethod
    def unknown(cls, columns: int) -> InputStatistics:
        """For matrices whose input was never seen: every column matters alike."""
        return cls(torch.eye(columns), 0)

    @property
    def diagonal(self) -> Tensor:
        """Mean square of each column, (columns,)."""
        return self.hessian.diagonal()
