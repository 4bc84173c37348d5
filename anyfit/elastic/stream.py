"""A network on disk that runs as any config of its space, block after block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from anyfit.activations import Rounding
from anyfit.core.config import Config
from anyfit.core.space import Decision, Space
from anyfit.core.units import Weight
from anyfit.distributed import ALONE, Group
from anyfit.elastic.model import Decoded
from anyfit.streaming import Numbers, Stream


@dataclass(frozen=True)
class Chosen:
    """The original's numbers but for the matrices that have one of `choices`, by name: a `streaming.Numbers`."""

    original: Numbers
    decoded: Decoded
    choices: Mapping[str, str]

    def matrix(self, weight: Weight) -> Tensor:
        choice = self.choices.get(weight.name)
        return self.original.matrix(weight) if choice is None else self.decoded(weight, choice)

    def rows(self, weight: Weight, which: Tensor | slice) -> Tensor:
        choice = self.choices.get(weight.name)
        return self.original.rows(weight, which) if choice is None else self.decoded.rows(weight, choice, which)

    def inputs(self, weight: Weight) -> Rounding | None:
        choice = self.choices.get(weight.name)
        return self.original.inputs(weight) if choice is None else self.decoded.inputs(weight, choice)


@dataclass(frozen=True)
class Unrounded:
    """The same matrices, of which none rounds what it multiplies."""

    numbers: Numbers

    def matrix(self, weight: Weight) -> Tensor:
        return self.numbers.matrix(weight)

    def rows(self, weight: Weight, which: Tensor | slice) -> Tensor:
        return self.numbers.rows(weight, which)

    def inputs(self, weight: Weight) -> None:
        return None


@dataclass(frozen=True)
class ElasticStream:
    """What `elastic.model.ElasticModel` is for a network in memory."""

    stream: Stream
    space: Space
    decoded: Decoded
    group: Group = ALONE

    @property
    def original(self) -> Numbers:
        return self.stream.original

    def numbers(self, config: Config) -> Numbers:
        """Those that the model extracted at `config` has."""
        return Chosen(self.original, self.decoded, {w.name: config[d.key] for d in self.space.decisions for w in d.unit.weights})

    def disturbed(self, decision: Decision, choice: str) -> Numbers:
        """The original's, but for this one unit."""
        return Chosen(self.original, self.decoded, {weight.name: choice for weight in decision.unit.weights})
