"""The contract of a quantizer: it chooses the codes of one matrix in a format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyfit.calibration.statistics import InputStatistics
from anyfit.formats.base import Format


@dataclass(frozen=True)
class Encoded:
    """One variant: the file's bytes, uint8 (data_rows, row_bytes), and what they cost.

    `errors` (rows,): the expected squared error of each output, the diagonal of D H Dᵀ with D the weights' error and H the
    mean of x xᵀ over the calibration inputs. `notes` says aloud what was out of the ordinary. `alone` (rows,): about what the errors would
    be, had the variant not been made so that finer or coarser ones are nested in each other; None where it wasn't.
    """

    data: Tensor
    errors: Tensor
    notes: tuple[str, ...] = ()
    alone: Tensor | None = None

    @property
    def error(self) -> float:
        """Expected squared error of all outputs, tr(D H Dᵀ)."""
        return float(self.errors.sum())

    def rows(self, which: slice) -> Encoded:
        """The variant of these rows alone; not of a format that stores a matrix as a whole."""
        return Encoded(self.data[which], self.errors[which], self.notes, None if self.alone is None else self.alone[which])


class Quantizer(ABC):
    """Stateless. `prepare` is called once per distinct input, `encode` for every matrix and format on it."""

    name: str

    @abstractmethod
    def prepare(self, statistics: InputStatistics, formats: Iterable[Format] = ()) -> Any:
        """Whatever all formats of all matrices with this input can share: orders, factorisations. `formats`: those that are known to be
        asked for."""

    @abstractmethod
    def encode(self, weight: Tensor, prepared: Any, format_: Format) -> Encoded:
        """(rows, columns) float32 to the format's bytes. The weight isn't changed. Deterministic."""

    @abstractmethod
    def statistics(self, prepared: Any) -> InputStatistics:
        """Those of the input that something was prepared for."""

    def errors(self, difference: Tensor, prepared: Any) -> Tensor:
        """`Encoded.errors` of a variant that is off by (rows, columns), wherever it comes from."""
        return output_errors(difference, self.statistics(prepared).hessian)


def output_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """The diagonal of D H Dᵀ, (rows,) float64: expected squared errors when the weights are off by D (rows, columns)."""
    difference = difference.to(hessian.device)
    return ((difference @ hessian) * difference).sum(1, dtype=torch.float64).clamp_min(0).cpu()
