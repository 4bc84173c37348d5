"""Evolution over configs, on fitness that needs no network."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_search import every_config, random_problem

from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.progress import Silent
from anyfit.scores.table import Table
from anyfit.searchers.base import Fitness, Ranked
from anyfit.searchers.evolution import Settings, Stage, evolve
from anyfit.searchers.exact import solve
from anyfit.searchers.mutation import Mutation


def regular_problem(seed: int, num_units: int = 6) -> tuple[Space, Table]:
    """Units of three sizes, each with the same four formats: errors fall fourfold with each bit, as they do in networks."""
    rng = np.random.default_rng(seed)
    bits = {"f2": 2.625, "f3": 3.4375, "f4": 4.5, "f6": 6.5625}
    decisions, errors = [], {}
    for i, rows in enumerate(rng.choice([1, 2, 4], num_units)):
        weight = Weight(f"unit{i}.weight", (int(rows), 256), "q", None)
        sizes = {name: int(b * weight.num_weights / 8) for name, b in bits.items()}
        decisions.append(Decision(Unit(f"unit{i}", (weight,)), tuple(Choice(name, size, size) for name, size in sizes.items())))
        errors[f"unit{i}"] = {name: float(weight.num_weights * 4**-b * rng.uniform(0.8, 1.2)) for name, b in bits.items()}
    sensitivity = {unit: float(rng.lognormal(0, 1)) for unit in errors}
    return Space(tuple(decisions), 77, 50, sum(d.unit.num_weights for d in decisions)), Table(sensitivity, errors)


def middling(space: Space, share: float = 0.4) -> Budget:
    """A budget between the smallest and the largest config, on both costs."""
    least, most = space.costs(space.smallest()), space.costs(space.largest())
    limits = {cost: least[cost] + share * (most[cost] - least[cost]) for cost in least}
    return Budget((("bits", limits["bits"]), ("bytes", 1.01 * limits["bytes"])), "middling")


def entangled(space: Space, table: Table) -> Fitness:
    """What the table predicts, times a factor for neighbours that are both rough: no sum of units says it."""

    def fitness(config: Config) -> float:
        scores = np.array([table.score(d.unit.name, config[d.key]) for d in space.decisions])
        return float(scores.sum() + 2 * np.sqrt(scores[1:] * scores[:-1]).sum())

    return fitness


def counted(fitness: Fitness) -> tuple[Fitness, Counter[str]]:
    seen: Counter[str] = Counter()

    def measured(config: Config) -> float:
        seen[config.digest] += 1
        return fitness(config)

    return measured, seen


def run(space: Space, table: Table, budget: Budget, start: Config, *stages: Stage, generations: int = 5, seed: int = 0) -> list[Ranked]:
    chosen = Settings(stages, generations, seed)
    return evolve(space, table, budget=budget, start=[start], settings=chosen, progress=Silent())


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), draws=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_mutations_keep_the_budget(seed: int, share: float, draws: int) -> None:
    space, table = random_problem(seed, num_units=8)
    budget = middling(space, share)
    rng = np.random.default_rng(draws)
    parent = solve(space, table, budget)
    mutation = Mutation(space, table, budget, [space.smallest(), parent])
    for start in (space.smallest(), parent):
        rungs = mutation.rungs(start)
        assert mutation.config(rungs) == start
        for _ in range(5):
            drawn = mutation.draw(rungs, rng)
            if drawn is not None:
                assert budget.allows(space.costs(mutation.config(drawn)))


@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
@settings(max_examples=12, deadline=None)
def test_everything_returned_is_within_the_budget_and_starts_from_the_best_known(seed: int, share: float) -> None:
    space, table = random_problem(seed, num_units=8)
    budget = middling(space, share)
    fitness = entangled(space, table)
    start = solve(space, table, budget)
    found = run(space, table, budget, start, Stage(lambda config: -fitness(config), 8), Stage(fitness, 3), seed=seed)
    assert all(budget.allows(space.costs(ranked.config)) for ranked in found)
    assert [ranked.fitness for ranked in found] == sorted(ranked.fitness for ranked in found)
    assert found[0].fitness <= fitness(start)
    assert start in [ranked.config for ranked in found]


@pytest.mark.parametrize("seed", range(4))
def test_finds_the_optimum_from_the_worst_start(seed: int) -> None:
    space, table = regular_problem(seed)
    budget = middling(space)
    best = min(table.predict(space, c) for c in every_config(space) if budget.allows(space.costs(c)))

    def fitness(config: Config) -> float:
        return table.predict(space, config)

    # What the search is told of the units is off by up to a factor of two: only measuring finds the way.
    rng = np.random.default_rng(seed)
    told = Table({unit: value * 2 ** rng.uniform(-1, 1) for unit, value in table.sensitivity.items()}, table.errors)
    found = run(space, told, budget, space.smallest(), Stage(fitness, 16), generations=12)
    assert found[0].fitness == pytest.approx(best, rel=1e-9)


def test_gains_where_scores_do_not_add_up() -> None:
    space, table = random_problem(2, num_units=12)
    budget, fitness = middling(space), entangled(space, table)
    start = solve(space, table, budget)
    found = run(space, table, budget, start, Stage(fitness, 24), generations=12)
    assert found[0].fitness < 0.99 * fitness(start)


def formats_that_are_slow() -> tuple[Space, Table]:
    """Two units, whole in float32, whole in integers that take longer, or half in float32: that has more bytes than the integers and is
    further from the original, but is the only one that saves time."""
    figures = {"whole": (100, 10.0, 0.0), "integers": (25, 12.0, 5.0), "half": (50, 5.0, 8.0)}
    choices = tuple(Choice(name, bytes_, bytes_, {"ms": ms}) for name, (bytes_, ms, _) in figures.items())
    units = [Unit(name, (Weight(f"{name}.weight", (1, 25), "q", None),)) for name in ("first", "second")]
    scores = {name: score for name, (_, _, score) in figures.items()}
    space = Space(tuple(Decision(unit, choices) for unit in units), 0, 0, 50, {"ms": 0.0})
    return space, Table({"first": 1.0, "second": 0.9}, {unit.name: scores for unit in units})


def test_what_is_large_but_fast_is_tried_where_time_is_limited() -> None:
    space, table = formats_that_are_slow()
    budget, wanted = Budget((("ms", 15.0),), "15 ms"), ["half", "whole"]
    start = solve(space, table, budget)
    assert list(start.values()) == ["whole", "half"]
    found = run(space, table, budget, start, Stage(lambda config: float(list(config.values()) != wanted), 4))
    assert list(found[0].config.values()) == wanted


def test_ladders_leave_out_what_nothing_speaks_for() -> None:
    """Integers are of use where bytes are limited, and halves where time is."""
    space, table = formats_that_are_slow()
    for limits, known in (
        ({"ms": 30.0}, {"half", "whole"}),
        ({"bytes": 300.0}, {"integers", "whole"}),
        ({"bytes": 300.0, "ms": 30.0}, {"half", "integers", "whole"}),
    ):
        mutation = Mutation(space, table, Budget(tuple(limits.items()), ""), [space.largest()])
        rungs = [np.full(2, rung) for rung in range(len(known))]
        assert {name for some in rungs for name in mutation.config(some).values()} == known
        assert [mutation.config(some)["first", "format"] for some in rungs][-1] == "whole"


def test_no_stage_measures_a_config_twice() -> None:
    space, table = random_problem(4)
    budget = middling(space)
    stages = [counted(entangled(space, table)) for _ in range(3)]
    entrants = (20, 6, 2)
    generations = 6
    run(
        space,
        table,
        budget,
        space.smallest(),
        *(Stage(f, n) for (f, _), n in zip(stages, entrants, strict=True)),
        generations=generations,
    )
    for (_, seen), most in zip(stages, entrants, strict=True):
        assert set(seen.values()) == {1}
        assert len(seen) <= generations * most + 1
    assert stages[0][1].keys() >= stages[1][1].keys() >= stages[2][1].keys() - {space.smallest().digest}


def test_is_deterministic_in_its_seed() -> None:
    space, table = random_problem(7, num_units=10)
    budget, fitness = middling(space), entangled(space, table)

    def measured(seed: int) -> list[tuple[str, float]]:
        found = run(space, table, budget, space.smallest(), Stage(fitness, 6), seed=seed)
        return [(ranked.config.digest, ranked.fitness) for ranked in found]

    state = np.random.get_state()[1].copy()  # noqa: NPY002  (that it stays as it is is the point)
    assert measured(1) == measured(1)
    assert measured(1) != measured(2)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


def test_a_start_that_no_mutation_can_change_is_its_own_answer() -> None:
    space, table = random_problem(3)
    budget = Budget((("bytes", float(space.bytes_(space.smallest()))),), "nothing to spend")
    found = run(space, table, budget, space.smallest(), Stage(entangled(space, table), 4))
    assert [ranked.config for ranked in found] == [space.smallest()]


@pytest.mark.parametrize("limit", ["bytes", "bits"])
def test_a_start_beyond_the_budget_is_a_mistake_of_ours(limit: str) -> None:
    space, table = random_problem(3)
    budget = Budget(((limit, space.costs(space.smallest())[limit]),), limit)
    with pytest.raises(AssertionError, match="within the budget"):
        run(space, table, budget, space.largest(), Stage(entangled(space, table), 4))
