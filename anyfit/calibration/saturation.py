"""How much text is enough: what a matrix loses on held-out text, by how much text it was calibrated with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.calibration.collect import collect, collect_growing
from anyfit.calibration.data import Segments
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.units import Weight
from anyfit.progress import Progress

Stored = Callable[[Weight, Tensor, InputStatistics], Tensor]
"""A matrix, its weights (rows, columns) and statistics of its input to the values that would be stored."""

ENOUGH = 0.02
"""Less than this share of the error gained by twice the text: more is not worth its time."""
MOST_ROWS = 256
"""Of a matrix; rows are stored independently of each other, so these say what all would."""
_HALVINGS = 3


@dataclass(frozen=True)
class Row:
    """`error`: squared error of the outputs on held-out text, as a share of the outputs' own squares, mean over matrices."""

    segments: int
    tokens: int
    error: float


@dataclass(frozen=True)
class Saturation:
    """Errors by rising amounts of calibration text, each twice the one before; the last is all that a fit would use."""

    rows: tuple[Row, ...]

    @property
    def gain(self) -> float:
        """The share of the error that the last doubling took away; negative where it added some."""
        return 1 - self.rows[-1].error / self.rows[-2].error if self.rows[-2].error else 0.0

    @property
    def enough(self) -> bool:
        return self.gain < ENOUGH

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"gain": self.gain, "enough": self.enough, "verdict": self.verdict}

    @property
    def verdict(self) -> str:
        """One sentence."""
        last, before = self.rows[-1].segments, self.rows[-2].segments
        change = f"{'lowers' if self.gain >= 0 else 'raises'} the error on held-out text by {abs(self.gain):.1%}".replace("%", " %")
        found = f"going from {before} to {last} segments {change}"
        return f"Enough text: {found}." if self.enough else f"More text would help: {found}. Try --segments {2 * last}."


def saturate(
    model: PreTrainedModel,
    architecture: Architecture,
    matrices: Mapping[Weight, Tensor],
    segments: Segments,
    stored: Stored,
    *,
    seed: int,
    progress: Progress,
) -> Saturation | None:
    """Store `matrices` as calibrated on an eighth, a quarter, half and all of the text; measure each on the search segments.

    One pass over the text serves all amounts. None where there are fewer than two segments.
    """
    sizes = _sizes(len(segments.calibration))
    if len(sizes) < 2:
        return None
    order = torch.randperm(len(segments.calibration), generator=torch.Generator().manual_seed(seed))
    weights = list(matrices)
    held = collect(model, architecture, weights, segments.search, progress=progress)
    grown = collect_growing(model, architecture, weights, segments.calibration[order], sizes, progress=progress)
    length = segments.calibration.shape[1]
    rows = []
    for size, seen in zip(sizes, grown, strict=True):
        errors = [_error(weight, matrix[:MOST_ROWS], seen, held, stored) for weight, matrix in matrices.items()]
        rows.append(Row(size, size * length, sum(errors) / len(errors)))
    return Saturation(tuple(rows))


def _sizes(most: int) -> Sequence[int]:
    return sorted({most >> halvings for halvings in range(_HALVINGS + 1)} - {0})


def _error(
    weight: Weight, matrix: Tensor, seen: Mapping[str, InputStatistics], held: Mapping[str, InputStatistics], stored: Stored
) -> float:
    assert weight.input is not None, weight.name
    hessian = held[weight.input].hessian
    difference = matrix - stored(weight, matrix, seen[weight.input])
    return float(_power(difference, hessian) / _power(matrix, hessian))


def _power(matrix: Tensor, hessian: Tensor) -> Tensor:
    """tr(M H Mᵀ): the mean square of all outputs."""
    return ((matrix @ hessian) * matrix).sum(dtype=torch.float64)
