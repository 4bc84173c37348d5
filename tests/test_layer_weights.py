"""Weights of units that are drawn and kept where the whole says so, on fitness that needs no network."""

from __future__ import annotations

from dataclasses import replace

import pytest
from test_evolution import counted, middling, regular_problem
from test_search import every_config

from anyfit.core.config import Config
from anyfit.progress import Silent
from anyfit.scores.table import Table
from anyfit.searchers.layer_weights import Settings, search

SETTINGS = Settings(drawn=60, share=0.5, patience=100)


@pytest.mark.parametrize("seed", range(3))
def test_hidden_sensitivities_are_found(seed: int) -> None:
    """The fitness is a sum whose weights the search isn't told: it comes close to the optimum, as the best of few drawn doesn't."""
    space, table = regular_problem(seed)
    budget = middling(space)
    told = Table(dict.fromkeys(table.sensitivity, 1.0), table.errors)

    def fitness(config: Config) -> float:
        return table.predict(space, config)

    best = min(fitness(config) for config in every_config(space) if budget.allows(space.costs(config)))
    found = search(space, told, budget=budget, fitness=fitness, settings=SETTINGS, progress=Silent())
    assert found[0].fitness <= 1.1 * best
    assert all(budget.allows(space.costs(ranked.config)) for ranked in found)
    assert [ranked.fitness for ranked in found] == sorted(fitness(ranked.config) for ranked in found)
    drawn = search(space, told, budget=budget, fitness=fitness, settings=replace(SETTINGS, patience=0), progress=Silent())
    assert {one.config for one in drawn} <= {one.config for one in found} and found[0].fitness <= drawn[0].fitness


def test_only_relative_errors_of_a_unit_count() -> None:
    space, table = regular_problem(1)
    budget, other = middling(space), Table(dict.fromkeys(table.sensitivity, 3.0), {u: dict(row) for u, row in table.errors.items()})
    for index, row in enumerate(other.errors.values()):
        row.update({name: (index + 1) * error for name, error in row.items()})  # type: ignore[attr-defined]
    found = [
        search(space, one, budget=budget, fitness=lambda c: table.predict(space, c), settings=SETTINGS, progress=Silent())
        for one in (table, other)
    ]
    assert found[0] == found[1]


def test_measurements_are_counted_and_none_is_made_twice() -> None:
    space, table = regular_problem(2)
    fitness, seen = counted(lambda config: table.predict(space, config))
    few = search(space, table, budget=middling(space), fitness=fitness, settings=replace(SETTINGS, most=7), progress=Silent())
    assert len(few) == len(seen) == 7 and set(seen.values()) == {1}
    again = search(space, table, budget=middling(space), fitness=fitness, settings=replace(SETTINGS, most=7), progress=Silent())
    assert again == few
