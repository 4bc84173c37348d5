"""Which config each step of training runs as.

A sampler states a distribution over the choices of every decision; decisions are drawn from it independently.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator

from anyfit.core.config import Config
from anyfit.core.space import Decision


class Draws(Protocol):
    """What training needs of a sampler."""

    def draws(self, step: int, seed: int) -> Sequence[Config]:
        """The configs of a step, one after another; by these numbers alone, so that a killed run goes on as it would have."""


Probabilities = Mapping[tuple[str, str], NDArray[np.float64]]
"""Of each decision's choices, in their order."""


class Sampler(ABC):
    """Deterministic: a step's config depends on the step and the seed alone, so that a killed run goes on as it would have."""

    def __init__(self, decisions: Sequence[Decision], period: int) -> None:
        """`period`: steps after which a schedule begins anew."""
        self.decisions, self.period = tuple(decisions), period

    @abstractmethod
    def probabilities(self, step: int) -> Probabilities:
        """The distribution that the step's config is drawn from."""

    def draws(self, step: int, seed: int) -> Sequence[Config]:
        """The configs of a step, one after another."""
        return [self.draw(step, seed)]

    def draw(self, step: int, seed: int) -> Config:
        """One config, from the stated distribution."""
        generator = Generator().manual_seed(seed * 1_000_003 + step)
        chosen = {}
        for decision in self.decisions:
            weights = torch.from_numpy(self.probabilities(step)[decision.key])
            chosen[decision.key] = decision.choices[int(torch.multinomial(weights, 1, generator=generator))].name
        return Config(chosen)


class Uniform(Sampler):
    """Every choice alike. The mean over many decisions hardly ever leaves the middle."""

    def probabilities(self, step: int) -> Probabilities:
        return {d.key: np.full(len(d.choices), 1 / len(d.choices)) for d in self.decisions}


@dataclass(frozen=True)
class _Bits:
    """Of the choices of each decision, and how many weights that is about."""

    choices: tuple[NDArray[np.float64], ...]
    weights: NDArray[np.float64]

    def mean(self, tilt: float) -> float:
        """Expected bits per weight where choices have probabilities in proportion to exp(tilt * bits)."""
        means = [float(_tilted(bits, tilt) @ bits) for bits in self.choices]
        return float(np.average(means, weights=self.weights))


class Balanced(Sampler):
    """The resource-balanced schedule of LLM-QFA: over a `period`, the mean bits go from the most to the least and back.

    As printed, the paper's triangle wave lacks its lower end; here it is b_1 + (b_N - b_1) |2 (t mod S) / S - 1|. How choices
    follow from the mean isn't in the paper: here p(b) is in proportion to exp(theta b), with theta such that the mean is met.
    """

    MARGIN = 0.01
    """Of the way between the ends that the mean keeps off them, where theta would be infinite."""

    def __init__(self, decisions: Sequence[Decision], period: int) -> None:
        super().__init__(decisions, period)
        bits = tuple(np.array([8 * choice.stored_bytes / d.unit.num_weights for choice in d.choices]) for d in self.decisions)
        self._bits = _Bits(bits, np.array([float(d.unit.num_weights) for d in self.decisions]))
        self._lowest = float(np.average([b.min() for b in bits], weights=self._bits.weights))
        self._highest = float(np.average([b.max() for b in bits], weights=self._bits.weights))
        self._known: dict[int, Probabilities] = {}

    def target(self, step: int) -> float:
        """Mean stored bits per weight at this step."""
        part = abs(2 * (step % self.period) / self.period - 1)
        return self._lowest + (self._highest - self._lowest) * min(max(part, self.MARGIN), 1 - self.MARGIN)

    def probabilities(self, step: int) -> Probabilities:
        place = step % self.period
        if place not in self._known:
            tilt = self._tilt(self.target(step))
            parts = zip(self.decisions, self._bits.choices, strict=True)
            self._known[place] = {decision.key: _tilted(bits, tilt) for decision, bits in parts}
        return self._known[place]

    def _tilt(self, target: float) -> float:
        low, high = -64.0, 64.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._bits.mean(middle) < target else (low, middle)
        return (low + high) / 2


def _tilted(bits: NDArray[np.float64], tilt: float) -> NDArray[np.float64]:
    powers = tilt * bits
    weights = np.exp(powers - powers.max())
    return weights / weights.sum()
