"""Distributions over the choices of every decision whose configs have given mean bits, and which are otherwise as even as can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyfit.core.space import Decision

Probabilities = Mapping[tuple[str, str], NDArray[np.float64]]
"""Of each decision's choices, in their order."""
MARGIN = 0.01
"""Of the way between the least and the most bits that a mean keeps off the ends, where the tilt would be infinite."""


@dataclass(frozen=True)
class Bits:
    """Stored bits a weight of all `choices` of some decisions, and how many `weights` each is about."""

    decisions: tuple[Decision, ...]
    choices: tuple[NDArray[np.float64], ...]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, decisions: Sequence[Decision]) -> Bits:
        bits = tuple(np.array([8 * choice.stored_bytes / d.unit.num_weights for choice in d.choices]) for d in decisions)
        return cls(tuple(decisions), bits, np.array([float(d.unit.num_weights) for d in decisions]))

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the most mean bits that a config can have."""
        low, high = (float(np.average([pick(b) for b in self.choices], weights=self.weights)) for pick in (np.min, np.max))
        return low, high

    def between(self, part: float, most: float = np.inf) -> float:
        """A mean, a part of the way from the least to the most bits, or to `most`."""
        low, high = self.ends
        return low + (min(high, most) - low) * min(max(part, MARGIN), 1 - MARGIN)

    def at(self, target: float) -> Probabilities:
        """Probabilities in proportion to exp(tilt * bits), the same tilt for all, with the expected mean at the target."""
        low, high = -64.0, 64.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mean(middle) < target else (low, middle)
        return {d.key: _tilted(bits, (low + high) / 2) for d, bits in zip(self.decisions, self.choices, strict=True)}

    def _mean(self, tilt: float) -> float:
        return float(np.average([float(_tilted(bits, tilt) @ bits) for bits in self.choices], weights=self.weights))


def _tilted(bits: NDArray[np.float64], tilt: float) -> NDArray[np.float64]:
    powers = tilt * bits
    weights = np.exp(powers - powers.max())
    return weights / weights.sum()
