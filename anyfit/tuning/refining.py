"""Refining one configuration: solved again in order, then tuned by gradients, at the very same bytes.

First every group of matrices is encoded anew for the inputs that really arrive (`sequential`). From there codes and
scales move together towards the original's predictions (`signround`). Each step is kept where it lowers the
divergence on held-out text. Embedding and head, which `sequential` leaves alone, are tuned with the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.architectures.base import Architecture
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.units import Weight
from anyfit.formats.base import CastFormat, GridFormat
from anyfit.progress import Progress
from anyfit.quantizers.base import Quantizer
from anyfit.quantizers.worker import one_thread
from anyfit.tasks.language import Reference, kl
from anyfit.tuning import signround
from anyfit.tuning.coded import Stored, Tuned
from anyfit.tuning.sequential import resolve

WINDOW = 256
"""Tokens of a tuning step's segments at most: many short steps do better than few long ones."""

NETWORKS = 6
"""As much memory as so many networks in float32 take what tuning holds beside the original and the stored one: levels, latents, values,
gradients and what they are made of."""


@dataclass(frozen=True)
class Settings:
    """`num_segments` that the matrices are solved again on; how far they are then tuned."""

    num_segments: int = 32
    tuning: signround.Settings = field(default_factory=signround.Settings)


@dataclass(frozen=True)
class Refined:
    """Bytes by matrix, of those that changed, and mean KL on the held-out text in nats per token, before and after."""

    data: dict[str, Tensor]
    before: float
    after: float


class Refinery:
    """Refines configurations of one network. `calibration` (segments, length) is what is solved and tuned on."""

    def __init__(
        self,
        original: PreTrainedModel,
        architecture: Architecture,
        quantizer: Quantizer,
        *,
        calibration: Tensor,
        held_out: Reference,
        settings: Settings | None = None,
    ) -> None:
        self._original, self._architecture, self._quantizer = original, architecture, quantizer
        self._calibration, self._held_out = calibration, held_out
        self._settings = settings or Settings()

    def refine(self, stored: PreTrainedModel, matrices: Sequence[Stored], progress: Progress) -> Refined:
        """`stored` runs as the configuration of `matrices` does, and is left with the refined values."""
        given = {entry.weight.name: entry for entry in matrices}
        before = kl(stored, self._held_out)
        if all(isinstance(entry.format_, CastFormat) for entry in matrices):
            return Refined({}, before, before)  # floating-point numbers have nothing to choose
        solver = _Solver(self._quantizer, given)
        resolve(
            stored,
            self._original,
            self._architecture,
            [entry.weight for entry in matrices],
            self._calibration[: self._settings.num_segments],
            solver.encode,
            progress=progress,
        )
        solved, now = solver.solved, kl(stored, self._held_out)
        if now >= before:
            solved, now = given, before
            _put(stored, given.values())
        tuned = self._tune(stored, solved, now, progress)
        data = {name: entry.data for name, entry in solved.items() if entry is not given[name]}
        if tuned.after < now:
            data |= {name: coded.data for name, coded in tuned.coded.items()}
            _put(stored, [Stored(given[n].weight, given[n].format_, data[n], given[n].order) for n in tuned.coded])
        return Refined(data, before, min(now, tuned.after))

    def _tune(self, stored: PreTrainedModel, entries: Mapping[str, Stored], now: float, progress: Progress) -> Tuned:
        grids = {name: entry.grid(self._original) for name, entry in entries.items() if isinstance(entry.format_, GridFormat)}
        if not grids:  # codebooks are solved again only
            return Tuned({}, now, now)
        return signround.tune(stored, grids, self._text, self._held_out, settings=self._settings.tuning, progress=progress)

    @cached_property
    def _text(self) -> Reference:
        return Reference.of(self._original, windows(self._calibration, self._settings.tuning.num_segments))


class _Solver:
    """Encodes matrices in their formats again, and keeps the bytes."""

    def __init__(self, quantizer: Quantizer, given: Mapping[str, Stored]) -> None:
        self.solved = dict(given)
        self._quantizer = quantizer

    def encode(self, weights: Sequence[Weight], wanted: Sequence[Tensor], statistics: InputStatistics) -> list[Tensor]:
        """See `sequential.Encode`."""
        with one_thread() as pool:
            return pool.submit(self._encode, weights, wanted, statistics).result()

    def _encode(self, weights: Sequence[Weight], wanted: Sequence[Tensor], statistics: InputStatistics) -> list[Tensor]:
        prepared = self._quantizer.prepare(statistics)
        values = []
        for weight, matrix in zip(weights, wanted, strict=True):
            old = self.solved[weight.name]
            matrix = matrix.contiguous() if old.order is None else matrix[old.order]
            new = Stored(weight, old.format_, self._quantizer.encode(matrix, prepared, old.format_).data, old.order)
            self.solved[weight.name] = new
            decoded = new.values()
            values.append(decoded.T if weight.transposed else decoded)
        return values


def windows(tokens: Tensor, most: int | None = None) -> Tensor:
    """Segments cut into windows of equal length, at most `WINDOW` tokens, (windows, length); the first `most` of them."""
    length = tokens.shape[1]
    parts = -(-length // WINDOW)
    return tokens[:, : length // parts * parts].reshape(-1, length // parts)[:most]


def _put(network: PreTrainedModel, entries: Iterable[Stored]) -> None:
    with torch.no_grad():
        for entry in entries:
            network.get_parameter(entry.weight.name).copy_(entry.values())
