"""Small changes of a config that keep a budget and leave none of it unused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.space import Space
from anyfit.scores.table import Table
from anyfit.searchers.problem import Problem

MOST_CHANGED = 3
"""Units that a mutation starts from; EvoPress's figure."""


class Mutation:
    """Draws mutations of configs of one space within one budget.

    Every unit has a *ladder*: its choices, the worst by the table first, without those to which another is preferable in
    score and in every cost that the budget limits, but with those of `known`. Under one limit sizes rise with it; under
    several, what is better may be larger in one and smaller in another, and what fits may be further off than a rung. A
    config is a rung per unit, (units,). A mutation moves k units a rung up or down, where k = min(U{1..3}, U{1..3}),
    lowers others until the budget holds, and spends what is left by the table. All units are drawn alike, as in EvoPress:
    leaning on the table there brought nothing beyond what spending by it brings.
    """

    def __init__(self, space: Space, table: Table, budget: Budget, known: Sequence[Config]) -> None:
        self._problem = Problem.of(space, table)
        sizes, self._left = self._problem.limits(budget)
        chosen = np.stack([self._problem.chosen(config) for config in known])
        ladders = [_ladder(self._problem, sizes, unit, chosen[:, unit]) for unit in range(len(space.decisions))]
        self._tops = np.array([len(ladder) - 1 for ladder in ladders])
        self._choice = np.array([ladder + ladder[-1:] * (self._tops.max() + 1 - len(ladder)) for ladder in ladders])
        self._sizes = sizes[:, self._choice]
        self._scores = self._problem.score[self._choice]
        self._each = np.arange(len(ladders))

    def rungs(self, config: Config) -> np.ndarray:
        """The place of every unit's choice on its ladder, (units,)."""
        return (self._choice == self._problem.chosen(config)[:, None]).argmax(1)

    def config(self, rungs: np.ndarray) -> Config:
        """The inverse of `rungs`."""
        return self._problem.config(self._choice[self._each, rungs])

    def draw(self, rungs: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
        """A mutation, (units,), within the budget; None where this draw leads to none."""
        rungs, free = rungs.copy(), np.ones(len(rungs), bool)
        direction = 1 if rng.random() < 0.5 else -1
        for _ in range(rng.integers(1, MOST_CHANGED + 1, 2).min()):
            self._move(rungs, free, direction, rng)
        while not self._fits(rungs):
            if not self._move(rungs, free, -1, rng):
                return None
        self._spend(rungs, free)
        return rungs

    def _move(self, rungs: np.ndarray, free: np.ndarray, direction: int, rng: np.random.Generator) -> bool:
        """Move one of the `free` units, which it then isn't any more; whether one could be."""
        units = np.flatnonzero(free & (rungs < self._tops if direction > 0 else rungs > 0))
        if not len(units):
            return False
        unit = rng.choice(units)
        rungs[unit] += direction
        free[unit] = False
        return True

    def _spend(self, rungs: np.ndarray, free: np.ndarray) -> None:
        """Raise what buys most by the table for its share of the limit that it takes most of, as long as something fits; moved units
        stay."""
        while len(units := np.flatnonzero(free & (rungs < self._tops) & self._affordable(rungs))):
            now, then = rungs[units], rungs[units] + 1
            gain = self._scores[units, now] - self._scores[units, then]
            more = np.maximum(self._sizes[:, units, then] - self._sizes[:, units, now], 1)
            share = (more / np.maximum(self._left, 1)[:, None]).max(0)
            rungs[units[(gain / share).argmax()]] += 1

    def _affordable(self, rungs: np.ndarray) -> np.ndarray:
        """Of each unit, whether its next rung fits, (units,)."""
        higher = np.minimum(rungs + 1, self._tops)
        used = self._sizes[:, self._each, rungs]
        more = self._sizes[:, self._each, higher] - used
        return (used.sum(1)[:, None] + more <= self._left[:, None]).all(0)

    def _fits(self, rungs: np.ndarray) -> bool:
        return bool((self._sizes[:, self._each, rungs].sum(1) <= self._left).all())


def _ladder(problem: Problem, sizes: np.ndarray, unit: int, known: np.ndarray) -> list[int]:
    """Of one unit; `sizes` (limits, choices)."""
    choices = np.flatnonzero(problem.unit == unit)
    choices = choices[np.lexsort((*-sizes[::-1, choices], -problem.score[choices]))]
    costs = np.concatenate([problem.score[None, choices], sizes[:, choices]])
    no_worse = (costs[:, :, None] <= costs[:, None]).all(0)
    # Of those that are alike in everything the first one stays.
    dominated = no_worse & (~no_worse.T | np.tri(len(choices), k=-1, dtype=bool).T)
    return choices[~dominated.any(0) | np.isin(choices, known)].tolist()
