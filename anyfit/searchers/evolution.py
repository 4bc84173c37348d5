"""Evolution over configs: where scores don't quite add up, measure what differs a little from the best known.

Each generation changes the parent in a few units within the budget, sorts the offspring on little text, the
better ones on more, and the best of all becomes the next parent. See EvoPress (Sieberling et al. 2024,
https://arxiv.org/abs/2410.14649). Unlike there, the additive table helps: its exact optimum may be the start, and
it spends what a change leaves of the budget, as units differ in size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.space import Space
from anyfit.progress import Progress
from anyfit.scores.table import Table
from anyfit.searchers.base import Fitness, Ranked, Searcher, Subject
from anyfit.searchers.exact import Solver
from anyfit.searchers.mutation import Mutation

STAGES, GENERATIONS = ((2, 8), (16, 2)), 5
"""(segments, entrants) of each stage, from the exact optimum of a budget."""
_DRAWS = 5
"""Mutations drawn for each one that is wanted, before a generation makes do with fewer new ones."""


@dataclass(frozen=True)
class Stage:
    """One sieve of a generation: the `entrants` best of the stage before; in the first, newly drawn ones."""

    fitness: Fitness
    entrants: int


@dataclass(frozen=True)
class Settings:
    """`stages` go from cheap to dear; the parent joins the last, whose best is the next parent."""

    stages: tuple[Stage, ...]
    generations: int
    seed: int = 0


def evolve(space: Space, table: Table, *, budget: Budget, start: Sequence[Config], settings: Settings, progress: Progress) -> list[Ranked]:
    """Every config that reached the last stage, the best first: all are within `budget`, and all of `start` are among them.

    The best of `start`, which must be within the budget, is the first parent. No stage measures a config twice.
    Deterministic as far as the fitness is.
    """
    assert start and all(budget.allows(space.costs(config)) for config in start), "evolution starts within the budget"
    mutation = Mutation(space, table, budget, start)
    rng = np.random.default_rng(settings.seed)
    sieves = [_Sieve(stage.fitness) for stage in settings.stages]
    last = sieves[-1]
    parent = last.sort(start)[0]
    with progress.stage("evolve", settings.generations) as shown:
        for _ in range(settings.generations):
            candidates = _offspring(mutation, parent, sieves[0], settings.stages[0].entrants, rng)
            for sieve, following in zip(sieves, settings.stages[1:], strict=False):
                candidates = sieve.sort(candidates)[: following.entrants]
            parent = last.sort([parent, *candidates])[0]
            shown.advance(detail=f"{last.known[parent]:.5f}")
    return [Ranked(config, last.known[config]) for config in last.sort(list(last.known))]


@dataclass
class _Sieve:
    """A stage's memory: what it has measured."""

    fitness: Fitness
    known: dict[Config, float] = field(default_factory=dict)

    def sort(self, configs: Sequence[Config]) -> list[Config]:
        """The fittest first; equals stay in order, so that a parent isn't left for nothing."""
        for config in configs:
            if config not in self.known:
                self.known[config] = self.fitness(config)
        return sorted(configs, key=self.known.__getitem__)


def _offspring(mutation: Mutation, parent: Config, sieve: _Sieve, wanted: int, rng: np.random.Generator) -> list[Config]:
    """Up to `wanted` different mutations of the parent that the sieve hasn't seen."""
    rungs = mutation.rungs(parent)
    found: dict[Config, None] = {}
    for _ in range(wanted * _DRAWS):
        if len(found) == wanted:
            break
        drawn = mutation.draw(rungs, rng)
        if drawn is not None and (config := mutation.config(drawn)) != parent and config not in sieve.known:
            found[config] = None
    return list(found)


class Evolution(Searcher):
    """Around the exact optimum of each budget."""

    name = "evolution"

    def search(self, subject: Subject, budgets: Sequence[Budget]) -> list[Config]:
        solver, found = Solver(subject.space, subject.table), list[Config]()
        settings = Settings(tuple(Stage(subject.fitness(num), entrants) for num, entrants in STAGES), GENERATIONS)
        for budget in budgets:
            start = [solver.solve(budget)]
            ranked = evolve(subject.space, subject.table, budget=budget, start=start, settings=settings, progress=subject.progress)
            found.append(ranked[0].config)
        return found

    def num_segments(self, num_budgets: int) -> int:
        return num_budgets * GENERATIONS * sum(segments * entrants for segments, entrants in STAGES)


SEARCHER = Evolution()
