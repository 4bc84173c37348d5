"""The best config under a budget, exactly, when scores add up."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from anyfit.core.budget import BITS, BYTES, LATENCY, WEIGHTS, Budget, typed
from anyfit.core.config import Config
from anyfit.core.errors import BudgetError
from anyfit.core.space import Space
from anyfit.scores.table import Table
from anyfit.searchers.base import Searcher, Subject
from anyfit.searchers.knapsack import GAP, Hull, optimum
from anyfit.searchers.problem import Problem

_SLACKS = (0.0, 1e-6)
"""Of a limit, left to the tolerance of the mixed-integer solver; the second where its solution for the first is over the limit by that."""


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

    @cached_property
    def _hulls(self) -> dict[str, Hull]:
        costs = (BYTES, BITS, *self.problem.space.others)
        return {cost: Hull.of(self.problem.unit, self.problem.score, self.problem.sizes(cost)) for cost in costs}

    def solve(self, budget: Budget) -> Config:
        """The config of least score whose costs are within `budget`. Raises `BudgetError` where no config is."""
        problem = self.problem
        require(problem.space, budget)
        sizes, left = problem.limits(budget)
        for row, (cost, _) in enumerate(budget.limits):
            found = optimum(problem.unit, problem.score, sizes[row], float(left[row]), self._hulls[cost])
            # The optimum under one limit that keeps the others too is the optimum under all.
            if (sizes[:, found].sum(1) <= left).all():
                break
        else:
            found = self._together(sizes, left, budget)
        assert (sizes[:, found].sum(1) <= left).all(), "the solver left its limits"
        return problem.config(found)

    def _together(self, sizes: np.ndarray, left: np.ndarray, budget: Budget) -> np.ndarray:
        """The optimum under several limits, none of which implies the others: a mixed-integer programme, (units,)."""
        problem = self.problem
        num, units = len(problem.unit), len(problem.space.decisions)
        one_each = csr_array((np.ones(num), (problem.unit, np.arange(num))), shape=(units, num))
        scale = np.maximum(np.abs(left), 1)
        for slack in _SLACKS:
            solved = milp(
                problem.score / max(problem.score.max(), 1e-300),
                constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(sizes / scale[:, None], -np.inf, left / scale - slack)],
                integrality=np.ones(num),
                bounds=Bounds(0, 1),
                options={"mip_rel_gap": GAP},
            )
            if solved.x is None:
                break
            found = np.flatnonzero(solved.x > 0.5)
            if (sizes[:, found].sum(1) <= left).all():
                return found
        raise BudgetError(
            f"The budget {budget.text!r} can't be met: each of its limits can, but not all at once.", remedy="Give more of one of them."
        )


def require(space: Space, budget: Budget) -> None:
    """Raises `BudgetError` where not even the smallest config is within `budget`, or the space doesn't know one of its costs."""
    costs = {BYTES, BITS, *space.others}
    for cost, _ in budget.limits:
        if cost == LATENCY and cost not in costs:
            raise BudgetError(
                f"The budget {budget.text!r} is a latency, and none was measured.",
                remedy="Measure it (anyfit measure), and fit with a recipe that prunes: anyfit fit --recipe ziplm --latency TABLE.",
            )
        if cost not in costs:
            raise BudgetError(
                f"The budget {budget.text!r} bounds {cost}, which are the same for every choice here.",
                remedy=f"Fit with a recipe for that: anyfit fit --recipe {'essential-sparsity' if cost == WEIGHTS else 'ziplm'}.",
            )
    least = {cost: space.least(cost) for cost, _ in budget.limits}
    if all(least[cost] <= bound for cost, bound in budget.limits):
        return
    possible = " and ".join(typed(cost, least[cost]) for cost, _ in budget.limits)
    remedy = f"Give more, or fit with smaller choices than those of this family (its smallest is {space.formats()[0]})."
    if WEIGHTS in space.others and WEIGHTS not in least:
        remedy = "Bound what masks change, as 'weights <= 50%': zeros take as many bytes as other numbers."
    raise BudgetError(f"The budget {budget.text!r} can't be met: the smallest possible is {possible}.", remedy=remedy)


class Exact(Searcher):
    """By the table alone."""

    name = "exact"

    def search(self, subject: Subject, budgets: Sequence[Budget]) -> list[Config]:
        solver = Solver(subject.space, subject.table)
        return [solver.solve(budget) for budget in budgets]

    def num_segments(self, num_budgets: int) -> int:
        return 0


SEARCHER = Exact()
