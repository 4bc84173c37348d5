"""What a network is pruned with: the matrix that reads each attention's heads and each feed-forward's channels, at every size.

The original's inputs say which structures matter least, and how the rest makes good for them (`anyfit.importance`). Each size is kept by
itself, as repairing changes all of the matrix; the order in which structures go is the same for all, so that each size is a prefix of the
larger ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from anyfit.calibration.collect import Moments
from anyfit.core.memory import release
from anyfit.core.units import Weight
from anyfit.encoding import CalibrationPass, Encoder, Matrices
from anyfit.importance.base import Importance
from anyfit.modeling_cut import spread
from anyfit.progress import Stage
from anyfit.structure.levels import Structure, kept_of


@dataclass(frozen=True)
class Structuring(CalibrationPass):
    """`structures` by the name of the matrix that reads them; `dtype`: that of the numbers that are kept."""

    structures: Mapping[str, Structure]
    importance: Importance
    dtype: torch.dtype

    name = "calibrate and prune"

    @contextmanager
    def encoder(self, stage: Stage) -> Iterator[Encoder]:
        yield _Pruner(self, stage)

    def matrix(self, weight: Weight) -> Tensor:
        """(outputs, inputs) float32."""
        stored = self.stream.stored.read(weight.name).float()
        return stored.T.contiguous() if weight.transposed else stored


@dataclass(frozen=True)
class _Pruner:
    structuring: Structuring
    stage: Stage

    def encode(self, groups: list[Matrices], moments: dict[str, Moments]) -> None:
        """Each process prunes some of the matrices."""
        owners = self.structuring.owners({weight.name: weight.num_weights for (weight,) in groups})
        for (weight,) in groups:
            assert weight.input is not None
            seen = moments.pop(weight.input)
            seen.add_up(self.structuring.group, owners[weight.name])
            if owners[weight.name] == self.structuring.group.rank:
                self._prune(weight, seen.statistics(weight.input).hessian)
            self.stage.advance(detail=weight.name)
            release()

    def _prune(self, weight: Weight, hessian: Tensor) -> None:
        run, structure = self.structuring, self.structuring.structures[weight.name]
        wanted = {name: kept_of(name) for name in run.choices[weight.name]}
        ladder = run.importance.ladder(run.matrix(weight), hessian, structure.size, list(wanted.values()))
        tensors, errors = {}, {}
        for name, kept in wanted.items():
            columns = spread(ladder.order[:kept], structure.size)
            tensors[name] = ladder.weights[kept][:, columns].to(run.dtype)
            errors[name] = ladder.errors[kept]
        run.store.write_levels(weight.name, tensors, errors, ladder.order)
