"""The contract of networks that are trained at all sizes: layers that run as any of their choices, whatever these are stored as.

Storages: *decoupled*, each choice with codes of its own, on a grid or in additive codebooks (`elastic.linear`); *nested*, small choices
made of the integers of the largest (`elastic.nested`).
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from typing import Generic, Protocol, TypeVar

from torch import Tensor, nn

from anyfit.core.space import Decision

M = TypeVar("M", bound=nn.Module)


class ElasticLayer(Protocol):
    """What computes with one matrix, as the choice that is set."""

    def set(self, choice: str) -> None:
        """An assignment: nothing is computed or allocated."""

    @property
    def matrix(self) -> Tensor:
        """As it runs now, with what was trained of it, (outputs, inputs) float32; of a convolution the shape of its weight."""


class Elastic(ABC, Generic[M]):
    """`model` runs as the config that is set. `layers`, by unit, are in it. `decisions` are about those units."""

    model: M
    layers: Mapping[str, ElasticLayer]
    decisions: tuple[Decision, ...]

    def set(self, config: Mapping[tuple[str, str], str]) -> M:
        """Run as `config` from now on."""
        for decision in self.decisions:
            self.layers[decision.unit.name].set(config[decision.key])
        return self.model
