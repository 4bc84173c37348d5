"""What a masked network is made of: every matrix in the blocks with each mask.

The numbers are stored once, as they are, and of each mask one bit a weight: nothing is repaired or rounded, so that a network with
any masks is known from these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from anyfit.calibration.collect import Moments
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.config import format_of
from anyfit.core.units import Weight
from anyfit.encoding import Encoder, Encoding, Matrices
from anyfit.formats import formats
from anyfit.formats.base import CastFormat
from anyfit.importance import saliencies
from anyfit.importance.sparsity import masked
from anyfit.progress import Stage
from anyfit.quantizers.base import Encoded, output_errors
from anyfit.structure.masks import Mask, mask_of, pack


@dataclass(frozen=True)
class Masking(Encoding):
    """`kept`: {mask: {matrix: weights}} of masks that are of the whole network together."""

    kept: Mapping[Mask, Mapping[str, int]]

    name = "calibrate and mask"

    @contextmanager
    def encoder(self, stage: Stage) -> Iterator[Encoder]:
        with super().encoder(stage) as rest:
            yield _Masker(self, rest, stage)


@dataclass(frozen=True)
class _Masker:
    """`rest` encodes the matrices outside the blocks, which aren't masked."""

    masking: Masking
    rest: Encoder
    stage: Stage

    def encode(self, groups: list[Matrices], moments: dict[str, Moments]) -> None:
        """Each process masks what reads some of the inputs."""
        run = self.masking
        self.rest.encode([group for group in groups if group[0].block is None], moments)
        readers: dict[str, Matrices] = {}
        for weight in (weight for group in groups for weight in group if weight.block is not None):
            readers.setdefault(str(weight.input), []).append(weight)
        sizes = {key: sum(weight.num_weights for weight in own) for key, own in readers.items()}
        for key, statistics in run.statistics(sizes, moments):
            if statistics:
                for weight in readers[key]:
                    self._mask(weight, statistics)
            self.stage.advance(len(readers[key]), detail=readers[key][-1].name)

    def _mask(self, weight: Weight, statistics: InputStatistics) -> None:
        run, hessian = self.masking, statistics.hessian.cpu()
        matrix, names = run.rows(weight, slice(None)), run.choices[weight.name]
        dense = formats.get(format_of(names[0]))
        assert isinstance(dense, CastFormat), dense.name
        shapes = {name: (len(matrix), -(-weight.shape[1] // 8) if mask_of(name) else dense.row_bytes(weight.shape[1])) for name in names}
        with run.store.writing(weight.name, shapes) as writing:
            scores: dict[str, torch.Tensor] = {}
            for name in names:
                mask = mask_of(name)
                if mask is None:
                    data = dense.encode(matrix)
                    writing.put(name, 0, Encoded(data, output_errors(matrix - dense.decode(data), hessian)))
                    continue
                if mask.score not in scores:
                    scores = {mask.score: saliencies.get(mask.score).scores(matrix, hessian, weight.name)}
                kept = masked(mask, scores[mask.score], run.kept.get(mask, {}).get(weight.name))
                writing.put(name, 0, Encoded(pack(kept), output_errors(matrix.masked_fill(kept, 0), hessian)))
