"""Searched layer weights: how much a unit's error matters isn't measured but drawn, and kept where the whole network says so.

Papers: "SPDY: Accurate Pruning with Speedup Guarantees", arXiv 2201.13096, section 3.2, and "ZipLM: Inference-Aware Structured Pruning
of Language Models", arXiv 2302.04089, section 3.2, which takes it over. With errors that are relative to a unit's largest, a vector of
weights c leads to the config that minimises the sum of c times error within the budget. First vectors are drawn, c ~ U(0, 1); then some
coordinates of the best are drawn again, fewer and fewer, and what improves stays.

Differences from the papers, and why:

* The config of each vector is solved exactly (`searchers.exact`), not for buckets of time, so that a budget is kept and several may hold.
* A config that was measured before isn't measured again, and `most` counts measurements, so that searches can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.space import Space
from anyfit.progress import Progress, Stage
from anyfit.scores.table import Table
from anyfit.searchers.base import Fitness, Ranked, Searcher, Subject
from anyfit.searchers.exact import solve

Weights = NDArray[np.float64]
NUM_SEGMENTS = 4
"""Of text, that each config is measured on."""


@dataclass(frozen=True)
class Settings:
    """Vectors that are `drawn` at first; the `share` of coordinates that are drawn again, until `patience` times in a row nothing is
    gained, then one coordinate fewer. `most`: configs that are measured at all."""

    drawn: int = 100
    share: float = 0.1
    patience: int = 100
    most: int = 1000
    seed: int = 0


def search(space: Space, table: Table, *, budget: Budget, fitness: Fitness, settings: Settings, progress: Progress) -> list[Ranked]:
    """Every config that was measured, the best first; all are within `budget`. Of the `table` only the relation of a unit's choices to
    each other is used."""
    rng, units = np.random.default_rng(settings.seed), len(space.decisions)
    with progress.stage("search layer weights", settings.most) as stage:
        seeker = _Seeker(space, table, budget, fitness, settings.most, stage)
        for _ in range(settings.drawn):
            seeker.improved(rng.random(units))
        for number in range(max(1, round(settings.share * units)), 0, -1):
            failed = 0
            while failed < settings.patience and not seeker.full:
                weights, again = seeker.best.copy(), rng.choice(units, number, replace=False)
                weights[again] = rng.random(number)
                failed = 0 if seeker.improved(weights) else failed + 1
    return [Ranked(config, seeker.known[config]) for config in sorted(seeker.known, key=seeker.known.__getitem__)]


class _Seeker:
    """What has been measured, and the `best` vector of weights."""

    def __init__(self, space: Space, table: Table, budget: Budget, fitness: Fitness, most: int, stage: Stage) -> None:
        self._space, self._budget, self._fitness, self._most, self._stage = space, budget, fitness, most, stage
        worst = {unit: max(row.values()) for unit, row in table.errors.items()}
        self._errors = {unit: {name: error / (worst[unit] or 1) for name, error in row.items()} for unit, row in table.errors.items()}
        self.known: dict[Config, float] = {}
        self.best: Weights = np.ones(len(space.decisions))
        self._least = np.inf

    @property
    def full(self) -> bool:
        return len(self.known) >= self._most

    def improved(self, weights: Weights) -> bool:
        """Whether these weights lead to a better config than all before; what can't be measured any more isn't."""
        sensitivity = dict(zip((d.unit.name for d in self._space.decisions), weights.tolist(), strict=True))
        config = solve(self._space, Table(sensitivity, self._errors), self._budget)
        if config not in self.known:
            if self.full:
                return False
            self.known[config] = self._fitness(config)
            self._stage.advance(detail=f"{min(self.known.values()):.5f}")
        if self.known[config] >= self._least:
            return False
        self.best, self._least = weights, self.known[config]
        return True


SETTINGS = Settings(drawn=40, most=60)


class LayerWeights(Searcher):
    """A search of its own for each budget."""

    name = "layer-weights"

    def search(self, subject: Subject, budgets: Sequence[Budget]) -> list[Config]:
        fitness, found = subject.fitness(NUM_SEGMENTS), list[Config]()
        for budget in budgets:
            ranked = search(subject.space, subject.table, budget=budget, fitness=fitness, settings=SETTINGS, progress=subject.progress)
            found.append(ranked[0].config)
        return found

    def num_segments(self, num_budgets: int) -> int:
        return num_budgets * NUM_SEGMENTS * SETTINGS.most


SEARCHER = LayerWeights()
