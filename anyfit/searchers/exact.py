"""The best config under a budget, exactly, when scores add up.

Choosing one option per unit under linear limits is the multiple-choice knapsack problem. A Lagrangian sweep
solves its convex hull and, at any budget, bounds the best score from below and above; only the choices whose
reduced cost fits between the bounds can be part of an optimum, and a small integer programme (HiGHS, through
scipy) over those finishes the proof. See Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import LinearConstraint, milp
from scipy.sparse import csr_array

from anyfit.core.budget import BITS, BYTES, Budget
from anyfit.core.config import Config
from anyfit.core.errors import BudgetError
from anyfit.core.space import Space
from anyfit.scores.table import Table

GAP = 1e-9
"""Relative: two scores closer than this are the same to the solver."""
_MOST_NODES = 20_000
"""Of the search tree; a count, not a time, so that the same problem has the same answer on any machine."""


@dataclass(frozen=True)
class _Problem:
    """All choices of all units as flat arrays, unit after unit."""

    space: Space
    unit: np.ndarray
    score: np.ndarray
    bytes_: np.ndarray
    stored: np.ndarray
    names: list[str]

    @classmethod
    def of(cls, space: Space, table: Table) -> _Problem:
        rows = [
            (i, table.score(d.unit.name, c.name), c.bytes_, c.stored_bytes, c.name)
            for i, d in enumerate(space.decisions)
            for c in d.choices
        ]
        unit, score, bytes_, stored, names = zip(*rows, strict=True)
        return cls(space, np.array(unit), np.array(score), np.array(bytes_, float), np.array(stored, float), list(names))

    def config(self, chosen: Sequence[int] | np.ndarray) -> Config:
        return Config({self.space.decisions[self.unit[i]].key: self.names[i] for i in chosen})

    def best(self, cost: np.ndarray) -> np.ndarray:
        """Index of each unit's choice of least cost; ties go to the smaller, then to the first."""
        order = np.lexsort((self.bytes_, cost, self.unit))
        return order[np.unique(self.unit[order], return_index=True)[1]]

    def limits(self, budget: Budget) -> list[tuple[np.ndarray, float]]:
        """What each limit leaves for the choices, after everything that is fixed."""
        rows = []
        for cost, bound in budget.limits:
            if cost == BYTES:
                rows.append((self.bytes_, bound - self.space.fixed_bytes))
            else:
                assert cost == BITS, cost
                rows.append((self.stored, bound * self.space.num_parameters / 8 - self.space.fixed_stored_bytes))
        return rows


def solve(space: Space, table: Table, budget: Budget) -> Config:
    """The config of least score whose costs are within `budget`.

    Raises `BudgetError` where no config is, with the smallest possible and what would allow less.
    """
    require(space, budget)
    problem = _Problem.of(space, table)
    limits = problem.limits(budget)
    feasible, lower, reduced = _lagrangian(problem, limits)
    upper = problem.score[feasible].sum()
    keep = reduced <= upper - lower + GAP * max(abs(upper), 1e-300)
    keep[feasible] = True
    if keep.sum() > len(space.decisions):
        feasible = _polish(problem, limits, np.flatnonzero(keep), feasible)
    config = problem.config(feasible)
    assert budget.allows(space.costs(config)), "the solver left its limits"
    return config


def hull(space: Space, table: Table) -> list[Config]:
    """The convex hull of (bytes, score), smallest first: every config that is optimal for some exchange rate."""
    problem = _Problem.of(space, table)
    chosen = problem.best(problem.bytes_ + 1e-9 * problem.score)
    configs = [problem.config(chosen)]
    while True:
        now = chosen[problem.unit]
        with np.errstate(divide="ignore", invalid="ignore"):
            rate = (problem.score[now] - problem.score) / (problem.bytes_ - problem.bytes_[now])
        rate[(problem.bytes_ <= problem.bytes_[now]) | (problem.score >= problem.score[now])] = 0
        step = int(rate.argmax())
        if rate[step] <= 0:
            return configs
        chosen = chosen.copy()
        chosen[problem.unit[step]] = step
        configs.append(problem.config(chosen))


def _lagrangian(problem: _Problem, limits: list[tuple[np.ndarray, float]]) -> tuple[np.ndarray, float, np.ndarray]:
    """A feasible choice per unit, a lower bound of the best score, and each choice's reduced cost at that bound.

    The limits are weighed into one by what they leave, which is exact for one limit and a valid relaxation
    for several; bisection finds the price of a byte at which the relaxed problem just fits.
    """
    weight = sum(size / bound for size, bound in limits)
    bound = float(len(limits))
    feasible = problem.best(problem.bytes_)
    low, high = 0.0, 1.0
    while True:
        chosen = problem.best(problem.score + high * weight)
        if all(size[chosen].sum() <= left for size, left in limits) or high > 1e30:
            break
        high *= 4
    best_lower, best_price = -np.inf, high
    for _ in range(100):
        price = (low + high) / 2
        cost = problem.score + price * weight
        chosen = problem.best(cost)
        value = cost[chosen].sum() - price * bound
        if value > best_lower:
            best_lower, best_price = value, price
        if all(size[chosen].sum() <= left for size, left in limits):
            high = price
            if problem.score[chosen].sum() < problem.score[feasible].sum():
                feasible = chosen
        else:
            low = price
    cost = problem.score + best_price * weight
    reduced = cost - cost[problem.best(cost)][problem.unit]
    return feasible, best_lower, reduced


def _polish(problem: _Problem, limits: list[tuple[np.ndarray, float]], keep: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """The optimum among the choices `keep`, by integer programming."""
    num = len(keep)
    one_each = csr_array((np.ones(num), (problem.unit[keep], np.arange(num))))
    scale = problem.score[keep].max() or 1.0
    constraints = [LinearConstraint(one_each, 1, 1)]
    for size, left in limits:
        # In units of the limit, so that the solver's tolerance is far below one byte of any file.
        constraints.append(LinearConstraint(size[keep][None] / left, -np.inf, 1 - 1e-12))
    result = milp(
        problem.score[keep] / scale,
        integrality=np.ones(num),
        bounds=(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": GAP, "node_limit": _MOST_NODES, "presolve": False},
    )
    if result.x is None:
        return fallback
    chosen = keep[np.flatnonzero(result.x > 0.5)]
    fits = all(size[chosen].sum() <= left for size, left in limits)
    better = problem.score[chosen].sum() <= problem.score[fallback].sum()
    return chosen if fits and better and len(chosen) == len(problem.space.decisions) else fallback


def require(space: Space, budget: Budget) -> None:
    """Raises `BudgetError` where not even the smallest config is within `budget`."""
    costs = space.costs(space.smallest())
    if budget.allows(costs):
        return
    least = " and ".join(_exactly(cost, costs[cost]) for cost, _ in budget.limits)
    raise BudgetError(
        f"The budget {budget.text!r} can't be met: the smallest possible is {least}.",
        remedy=f"Give more, or fit with smaller formats than those of this family (its smallest is {space.formats()[0]}).",
    )


def _exactly(cost: str, value: float) -> str:
    """A cost that, typed as a budget, is met."""
    return f"{math.ceil(value * 1000) / 1000:.3f} bits" if cost == BITS else f"{value:.0f} B"
