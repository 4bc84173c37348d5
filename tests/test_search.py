"""The exact searcher against brute force, and what the family promises about budgets."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace

import numpy as np
import pytest

from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.errors import BudgetError
from anyfit.core.space import Choice, Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.scores.table import Table
from anyfit.searchers.exact import Solver, hull, solve
from anyfit.searchers.knapsack import Hull, optimum


def random_problem(seed: int, num_units: int = 5, num_choices: int = 4) -> tuple[Space, Table]:
    rng = np.random.default_rng(seed)
    decisions, errors, sensitivity = [], {}, {}
    for i in range(num_units):
        name = f"unit{i}"
        sizes = sorted(int(s) for s in rng.integers(10, 1000, num_choices))
        choices = tuple(Choice(f"f{j}", 32 * -(-size // 32), size) for j, size in enumerate(sizes))
        weight = Weight(f"{name}.weight", (10, 100), "q", None)
        decisions.append(Decision(Unit(name, (weight,)), choices))
        errors[name] = {f"f{j}": float(e) for j, e in enumerate(sorted(rng.lognormal(0, 2, num_choices), reverse=True))}
        sensitivity[name] = float(rng.lognormal(0, 1))
    return Space(tuple(decisions), 77, 50, 1000 * num_units), Table(sensitivity, errors)


def every_config(space: Space) -> list[Config]:
    options = [[(d.key, c.name) for c in d.choices] for d in space.decisions]
    return [Config(dict(chosen)) for chosen in itertools.product(*options)]


@pytest.mark.parametrize("seed", range(8))
def test_solver_equals_brute_force_at_every_budget(seed: int) -> None:
    space, table = random_problem(seed)
    configs = every_config(space)
    sizes = sorted({space.bytes_(config) for config in configs})
    for size in sizes[:: max(1, len(sizes) // 12)]:
        found = solve(space, table, Budget((("bytes", float(size)),), f"{size} B"))
        best = min(table.predict(space, c) for c in configs if space.bytes_(c) <= size)
        assert space.bytes_(found) <= size
        assert table.predict(space, found) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_solver_equals_brute_force_under_two_limits(seed: int) -> None:
    space, table = random_problem(seed)
    configs = every_config(space)
    middle = configs[len(configs) // 2]
    budget = Budget((("bits", space.bits(middle)), ("bytes", space.bytes_(middle) * 0.98)), "two")
    allowed = [c for c in configs if budget.allows(space.costs(c))]
    found = solve(space, table, budget)
    assert budget.allows(space.costs(found))
    assert table.predict(space, found) == pytest.approx(min(table.predict(space, c) for c in allowed), rel=1e-9)


def test_hull_is_the_lower_convex_hull() -> None:
    space, table = random_problem(3)
    points = np.array([(space.bytes_(c), table.predict(space, c)) for c in every_config(space)])
    for config in hull(space, table):
        size, score = space.bytes_(config), table.predict(space, config)
        assert points[points[:, 0] <= size, 1].min() >= score - 1e-9
    sizes = [space.bytes_(c) for c in hull(space, table)]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)


def test_larger_budget_is_never_worse() -> None:
    space, table = random_problem(5, num_units=12)
    smallest, largest = space.bytes_(space.smallest()), space.bytes_(space.largest())
    scores = [table.predict(space, solve(space, table, Budget((("bytes", b),), ""))) for b in np.linspace(smallest, largest, 40)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(scores))


def test_impossible_budget_says_the_smallest_possible() -> None:
    space, table = random_problem(1)
    for impossible in ("100 B", "0.1 bits", "100 B and 0.1 bits"):
        with pytest.raises(BudgetError) as caught:
            solve(space, table, Budget.parse(impossible))
        quoted = caught.value.problem.split("smallest possible is ")[1].removesuffix(".")
        solve(space, table, Budget.parse(quoted))


def with_other_stored_sizes(space: Space, rng: np.random.Generator) -> Space:
    """Stored sizes that grow with the bytes of the file, but not in step: no limit implies the other."""
    decisions = []
    for decision in space.decisions:
        sizes = np.sort(rng.integers(10, 1000, len(decision.choices))).tolist()
        choices = tuple(replace(choice, stored_bytes=size) for choice, size in zip(decision.choices, sizes, strict=True))
        decisions.append(replace(decision, choices=choices))
    return replace(space, decisions=tuple(decisions))


def test_two_limits_that_both_bind() -> None:
    both = 0
    for seed in range(6):
        space, table = random_problem(seed)
        space = with_other_stored_sizes(space, np.random.default_rng(seed))
        costs = np.array([(space.bytes_(c), space.bits(c), table.predict(space, c)) for c in every_config(space)])
        for share in (0.1, 0.2, 0.3, 0.4, 0.5):
            bytes_, bits = costs[:, :2].min(0) + share * np.ptp(costs[:, :2], axis=0)
            small, rough = costs[:, 0] <= bytes_, costs[:, 1] <= bits
            best = costs[small & rough, 2].min()
            found = solve(space, table, Budget((("bits", float(bits)), ("bytes", float(bytes_))), "two"))
            assert table.predict(space, found) == pytest.approx(best, rel=1e-9)
            both += best > max(costs[small, 2].min(), costs[rough, 2].min())
    assert both >= 5, "too few cases in which either limit alone would allow better"


@pytest.mark.parametrize("seed", range(3))
def test_a_budget_that_is_just_met_is_met(seed: int) -> None:
    """However 8 * stored / parameters is rounded, a config is found at its own bits per weight."""
    space, table = random_problem(seed)
    solver = Solver(space, table)
    for config in every_config(space)[::31]:
        bits = space.bits(config)
        assert table.predict(space, solver.solve(Budget((("bits", bits),), ""))) <= table.predict(space, config) * (1 + 1e-9)


def test_a_limit_that_leaves_nothing() -> None:
    """Multiply-adds that are all fixed, and bytes that the best without more of them don't fit."""
    weight = Weight("w", (1, 1), "q", "w", 0)
    choices = {"a": [(10, 0, 3.0), (20, 0, 1.0)], "b": [(10, 5, 1.0), (30, 0, 4.0)]}
    decisions = [
        Decision(Unit(unit, (weight,)), tuple(Choice(str(size), size, size, {"macs": macs}) for size, macs, _ in own))
        for unit, own in choices.items()
    ]
    space = Space(tuple(decisions), 0, 0, 1, {"macs": 7.0})
    table = Table(dict.fromkeys(choices, 1.0), {unit: {str(size): score for size, _, score in own} for unit, own in choices.items()})
    found = solve(space, table, Budget((("bytes", 45.0), ("macs", 7.0)), "both"))
    assert found.chosen == {"a": "10", "b": "30"}


def test_a_whole_frontier_of_a_large_problem_takes_a_second() -> None:
    space, table = random_problem(9, num_units=200, num_choices=14)
    sizes = np.geomspace(space.bytes_(space.smallest()), space.bytes_(space.largest()), 64)
    began = time.process_time()
    solver = Solver(space, table)
    found = [solver.solve(Budget((("bytes", float(size)),), "")) for size in sizes]
    assert time.process_time() - began < 3, "it takes 0.7 s; a slow machine is given time"
    points = np.array([(space.bytes_(c), table.predict(space, c)) for c in hull(space, table)])
    for size, config in zip(sizes, found, strict=True):
        relaxed = np.interp(size, *points.T)
        score = table.predict(space, config)
        assert space.bytes_(config) <= size
        assert relaxed * (1 - 1e-9) <= score <= points[points[:, 0] <= size, 1].min() * (1 + 1e-9)


def test_opposed_limits_of_a_large_problem_take_seconds() -> None:
    """Sixty units of forty choices, of which the lighter are no faster: the mixed-integer programme is within reach of its relaxation."""
    rng = np.random.default_rng(4)
    decisions, errors = [], {}
    for index in range(60):
        size, macs = rng.integers(100, 1000, 40).tolist(), rng.integers(100, 1000, 40).tolist()
        choices = tuple(Choice(f"c{i}", s, s, {"macs": m}) for i, (s, m) in enumerate(zip(size, macs, strict=True)))
        name = f"unit{index}"
        decisions.append(Decision(Unit(name, (Weight(name, (10, 100), "q", None),)), choices))
        errors[name] = {f"c{i}": 1e5 / (s * m) * float(rng.lognormal(0, 0.3)) for i, (s, m) in enumerate(zip(size, macs, strict=True))}
    space, table = Space(tuple(decisions), 0, 0, 60_000, {"macs": 0.0}), Table(dict.fromkeys(errors, 1.0), errors)
    budget = Budget((("bytes", 24_000.0), ("macs", 24_000.0)), "both")
    began = time.process_time()
    solver = Solver(space, table)
    score = table.predict(space, solver.solve(budget))
    assert time.process_time() - began < 20, "it takes one or two seconds; a slow machine is given time"
    sizes, left = solver.problem.limits(budget)
    # Weighted together the limits are one that is no stricter; whatever the weights, its optimum is a bound from below.
    bounds = []
    for share in np.linspace(0, 1, 21):
        weight, limit = (np.array([share, 1 - share]) @ rows for rows in (sizes, left))
        bounds.append(
            solver.problem.score[
                optimum(
                    solver.problem.unit,
                    solver.problem.score,
                    weight,
                    float(limit),
                    Hull.of(solver.problem.unit, solver.problem.score, weight),
                )
            ].sum()
        )
    assert max(bounds) <= score * (1 + 1e-9)
    assert score <= max(bounds) * 1.05
