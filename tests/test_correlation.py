"""Correlation-guided sampling, on fitness that needs no network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_evolution import middling, regular_problem

from anyfit.core.budget import Budget
from anyfit.core.config import WIDTH, Config
from anyfit.core.errors import BudgetError
from anyfit.progress import Silent
from anyfit.searchers import evolution, searchers
from anyfit.searchers.base import Fitness, Subject
from anyfit.searchers.correlation import Settings, best, correlations, explore
from anyfit.searchers.exact import solve

SETTINGS = Settings(most_bits=7)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_units_that_matter_are_told_from_those_that_do_not(seed: int) -> None:
    space, table = regular_problem(seed, 12)
    found = explore(space, lambda config: table.predict(space, config), Settings(first=300, then=0, most_bits=7), Silent())
    assert len(found) > 250 and [one.fitness for one in found] == sorted(one.fitness for one in found)
    own = correlations(space, {one.config: one.fitness for one in found})
    matters = {unit: table.score(unit, "f2") for unit in table.sensitivity}
    order = np.argsort(np.argsort([-own[unit] for unit in matters])), np.argsort(np.argsort(list(matters.values())))
    assert np.corrcoef(*order)[0, 1] > 0.2
    assert min(own, key=own.__getitem__) in sorted(matters, key=matters.__getitem__)[-3:]


@pytest.mark.parametrize("share", [0.2, 0.4, 0.7])
def test_one_exploration_serves_every_budget(share: float) -> None:
    space, table = regular_problem(4, 8)
    measured: list[Config] = []

    def fitness(config: Config) -> float:
        measured.append(config)
        return table.predict(space, config)

    found, budget = explore(space, fitness, SETTINGS, Silent()), middling(space, share)
    chosen = best(found, space, budget)
    assert chosen is not None and budget.allows(space.costs(chosen))
    assert len(measured) == len(set(measured)) <= SETTINGS.first + SETTINGS.then
    assert table.predict(space, chosen) == min(one.fitness for one in found if budget.allows(space.costs(one.config)))
    assert table.predict(space, solve(space, table, budget)) <= table.predict(space, chosen)
    assert [one.config for one in explore(space, fitness, SETTINGS, Silent())] == [one.config for one in found]


def test_what_is_drawn_later_keeps_sensitive_units_large() -> None:
    space, table = regular_problem(5, 8)
    drawn: list[Config] = []

    def fitness(config: Config) -> float:
        drawn.append(config)
        return table.predict(space, config)

    explore(space, fitness, SETTINGS, Silent())
    first, then = drawn[: SETTINGS.first], drawn[-SETTINGS.then // 2 :]
    lowest = {d.unit.name: [np.mean([config[d.key] in ("f2", "f3") for config in some]) for some in (first, then)] for d in space.decisions}
    kept = [unit for unit, (_, late) in lowest.items() if late == 0]
    assert len(kept) == 2 and all(lowest[unit][0] > 0.2 for unit in kept)


def test_a_budget_below_all_that_was_drawn_has_no_answer() -> None:
    space, table = regular_problem(6)
    found = explore(space, lambda config: table.predict(space, config), SETTINGS, Silent())
    assert best([one for one in found if one.config != space.smallest()], space, middling(space, 1e-6)) is None


@pytest.mark.parametrize("name", searchers)
def test_every_searcher_finds_a_config_within_each_budget_and_the_same_again(name: str) -> None:
    space, table = regular_problem(7, 8)
    measured, budgets = list[Config](), [middling(space, share) for share in (0.0, 0.3, 0.6)]

    def fitness(num_segments: int) -> Fitness:
        def lost(config: Config) -> float:
            measured.extend([config] * num_segments)
            return table.predict(space, config)

        return lost

    searcher, subject = searchers.get(name), Subject(space, table, fitness, Silent())
    assert searcher.name == name and searcher.refuses(space) is None
    found = searcher.search(subject, budgets)
    assert all(budget.allows(space.costs(config)) for budget, config in zip(budgets, found, strict=True))
    starts = len(budgets) * sum(stage[0] for stage in evolution.STAGES)
    assert len(measured) <= searcher.num_segments(len(budgets)) + (starts if name == "evolution" else 0)
    assert bool(measured) == (name != "exact")
    assert searcher.search(subject, budgets) == found
    losses = [table.predict(space, config) for config in found]
    assert all(table.predict(space, solve(space, table, b)) <= loss for b, loss in zip(budgets, losses, strict=True))
    with pytest.raises(BudgetError, match="can't be met"):
        searcher.search(subject, [Budget((("bytes", 1.0),), "1 B")])


def test_correlations_are_of_formats_alone() -> None:
    space, _ = regular_problem(7, 8)
    parts = replace(space, decisions=tuple(replace(d, axis=WIDTH) for d in space.decisions))
    assert "parts are left out" in (searchers.get("correlation").refuses(parts) or "")
