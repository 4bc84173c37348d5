"""The best config under a budget, exactly, when scores add up."""

from __future__ import annotations

import math
from functools import cached_property

from anyfit.core.budget import BITS, LATENCY, MACS, Budget
from anyfit.core.config import Config
from anyfit.core.errors import BudgetError
from anyfit.core.space import Space
from anyfit.scores.table import Table
from anyfit.searchers.knapsack import Hull, optimum, surrogate
from anyfit.searchers.problem import Problem


def solve(space: Space, table: Table, budget: Budget) -> Config:
    """The config of least score whose costs are within `budget`. For many budgets, keep a `Solver`.

    Raises `BudgetError` where no config is, with the smallest possible and what would allow less.
    """
    return Solver(space, table).solve(budget)


def hull(space: Space, table: Table) -> list[Config]:
    """The convex hull of (the space's leading cost, score), smallest first: every config that is optimal for some exchange rate."""
    problem = Problem.of(space, table)
    edges = Hull.of(problem.unit, problem.score, problem.sizes(space.scale))
    return [problem.config(edges.solution(num_edges)) for num_edges in range(len(edges.rate) + 1)]


class Solver:
    """One space and table, prepared once for any number of budgets.

    >>> solver = Solver(space, table)                                           # doctest: +SKIP
    >>> [solver.solve(Budget.parse(text)) for text in ("3 bits", "4 bits")]     # doctest: +SKIP
    """

    def __init__(self, space: Space, table: Table) -> None:
        self.problem = Problem.of(space, table)
        self._known = space.costs(space.smallest()).keys()

    @cached_property
    def _hulls(self) -> dict[str, Hull]:
        return {cost: Hull.of(self.problem.unit, self.problem.score, self.problem.sizes(cost)) for cost in self._known}

    def solve(self, budget: Budget) -> Config:
        """The config of least score whose costs are within `budget`. Raises `BudgetError` where no config is."""
        problem = self.problem
        require(problem.space, budget)
        sizes, left = problem.limits(budget)
        for row, (cost, _) in enumerate(budget.limits):
            found = optimum(problem.unit, problem.score, sizes[[row]], left[[row]], self._hulls[cost])
            # The optimum under one limit that keeps the others too is the optimum under all.
            if (sizes[:, found].sum(1) <= left).all():
                break
        else:
            both = Hull.of(problem.unit, problem.score, surrogate(sizes, left)[0])
            found = optimum(problem.unit, problem.score, sizes, left, both)
        assert (sizes[:, found].sum(1) <= left).all(), "the solver left its limits"
        return problem.config(found)


def require(space: Space, budget: Budget) -> None:
    """Raises `BudgetError` where not even the smallest config is within `budget`, or the space doesn't know one of its costs."""
    costs = space.costs(space.smallest())
    for cost, _ in budget.limits:
        if cost == LATENCY and cost not in costs:
            raise BudgetError(
                f"The budget {budget.text!r} is a latency, and none was measured.",
                remedy="Measure it (anyfit measure), and fit with a recipe that prunes: anyfit fit --recipe ziplm --latency TABLE.",
            )
        if cost not in costs:
            raise BudgetError(
                f"The budget {budget.text!r} bounds {cost}, which are the same for every choice here.",
                remedy="Fit with a recipe that prunes: anyfit fit --recipe ziplm.",
            )
    if budget.allows(costs):
        return
    least = " and ".join(_exactly(cost, costs[cost]) for cost, _ in budget.limits)
    raise BudgetError(
        f"The budget {budget.text!r} can't be met: the smallest possible is {least}.",
        remedy=f"Give more, or fit with smaller choices than those of this family (its smallest is {space.formats()[0]}).",
    )


def _exactly(cost: str, value: float) -> str:
    """A cost that, typed as a budget, is met."""
    if cost in (BITS, LATENCY):
        return f"{math.ceil(value * 1000) / 1000:.3f} {cost}"
    return f"{value:.0f} {'MACs' if cost == MACS else 'B'}"
