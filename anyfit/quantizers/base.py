"""The contract of a quantizer: it chooses the codes of one matrix on a format's grid."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyfit.calibration.statistics import InputStatistics
from anyfit.formats.base import Format


@dataclass(frozen=True)
class Encoded:
    """One variant: the file's bytes, and what they cost.

    `error` is the expected squared error of the outputs, tr(D H Dᵀ) with D the weights' error and H the mean
    of x xᵀ over the calibration inputs; `notes` says aloud what was out of the ordinary.
    """

    data: Tensor
    error: float
    notes: tuple[str, ...] = ()


class Quantizer(ABC):
    """Stateless. `prepare` is called once per distinct input, `encode` for every matrix and format on it."""

    name: str

    @abstractmethod
    def prepare(self, statistics: InputStatistics) -> Any:
        """Whatever all formats of all matrices with this input can share: orders, factorisations."""

    @abstractmethod
    def encode(self, weight: Tensor, prepared: Any, format_: Format) -> Encoded:
        """(rows, columns) float32 to the format's bytes. The weight isn't changed. Deterministic."""


def output_error(difference: Tensor, hessian: Tensor) -> float:
    """tr(D H Dᵀ): the expected squared error of the outputs when the weights are off by D (rows, columns)."""
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64).clamp_min(0))
