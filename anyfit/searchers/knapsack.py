"""The multiple-choice knapsack problem: one choice per unit, least score, total weight within a limit.

The convex hull of every unit's choices, sorted once by what a byte buys, solves the relaxed problem of any
limit by a look-up: that bounds the best score from below and gives a solution close to it. What is left in
between is closed by dynamic programming over the few choices whose reduced cost is smaller than that, units
nearest to the price of the limit first. See Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11.

Choices are flat arrays, unit after unit; a solution is one index per unit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

GAP = 1e-9
"""Relative: two scores closer than this are the same."""
_MOST_STATES = 50_000
"""Partial solutions looked at together; a count, not a time, so that the same problem has the same answer on any
machine. Beyond it the least promising are dropped, and with them the proof that nothing is better."""
_MOST_PAIRED = 120
"""Choices of which any two are tried together before the search."""


@dataclass(frozen=True)
class Hull:
    """The lower convex hulls of (weight, score) of all units, as edges, the best `rate` first.

    `start` (units,): the lightest choices. Edge e gives its `unit` the next `choice`, which is heavier by `weight`
    and scores rate * weight less.
    """

    start: np.ndarray
    unit: np.ndarray
    choice: np.ndarray
    rate: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, unit: np.ndarray, score: np.ndarray, weight: np.ndarray) -> Hull:
        order = np.lexsort((score, weight, unit))
        start, edges = [], []
        for i, choices in enumerate(np.split(order, np.flatnonzero(np.diff(unit[order])) + 1)):
            corners = _corners(weight[choices].tolist(), score[choices].tolist())
            start.append(choices[corners[0][0]])
            edges += [(i, choices[place], rate, heavier) for place, rate, heavier in corners[1:]]
        # Within a unit rates fall strictly, so sorting all of them keeps its order.
        edges.sort(key=lambda edge: -edge[2])
        units, choice, rate, heavier = np.array(edges, float).reshape(-1, 4).T
        return cls(np.array(start), units.astype(int), choice.astype(int), rate, heavier)

    def solution(self, num_edges: int) -> np.ndarray:
        """After the best `num_edges`, (units,)."""
        chosen = self.start.copy()
        chosen[self.unit[:num_edges]] = self.choice[:num_edges]
        return chosen


def _corners(weight: list[float], score: list[float]) -> list[tuple[int, float, float]]:
    """(place, rate, added weight) of each corner of one unit's hull; the choices are sorted by weight, then score."""
    corners = [(0, np.inf, 0.0)]
    for i in range(1, len(weight)):
        if score[i] >= score[corners[-1][0]]:
            continue
        while True:
            last, rate_before, _ = corners[-1]
            added = weight[i] - weight[last]
            rate = (score[last] - score[i]) / added
            if rate < rate_before:
                break
            corners.pop()
        corners.append((i, rate, added))
    return corners


def optimum(unit: np.ndarray, score: np.ndarray, weight: np.ndarray, limit: float, hull: Hull) -> np.ndarray:
    """The solution of least score whose `weight` (choices,) sums to at most `limit`.

    `hull` is that of the weights. Its start must be within the limit.
    """
    filled = weight[hull.start].sum() + np.cumsum(hull.weight)
    num_edges = int(np.searchsorted(filled, limit, "right"))
    price = hull.rate[num_edges] if num_edges < len(hull.rate) else 0.0
    relaxed = hull.solution(num_edges)
    slack = limit - weight[relaxed].sum()
    assert slack >= 0, "not even the lightest solution is within the limit"
    heavier = weight - weight[relaxed][unit]
    search = _Search(
        heavier=heavier,
        slack=slack,
        price=price,
        reduced=np.maximum(score - score[relaxed][unit] + price * heavier, 0),
        tolerance=GAP * abs(score[relaxed].sum()),
        excess=price * slack,
    )
    found = search.run(unit)
    return relaxed if found is None else _replaced(relaxed, unit, found)


def _replaced(chosen: np.ndarray, unit: np.ndarray, others: list[int]) -> np.ndarray:
    chosen = chosen.copy()
    chosen[unit[others]] = others
    return chosen


@dataclass
class _Search:
    """Dynamic programming over what differs from the relaxed solution; all weights and scores are relative to it.

    `excess` is the score of the best solution known, above the relaxed problem's bound; it falls during the
    search. A state is a partial solution: `over` (states,), its weight, and `cost` (states,), the reduced costs of
    its choices. A complete one exceeds the bound by cost + price * (slack - over).
    """

    heavier: np.ndarray
    slack: float
    price: float
    reduced: np.ndarray
    tolerance: float
    excess: float
    _steps: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    _best: list[int] | None = None

    def run(self, unit: np.ndarray) -> list[int] | None:
        """The choices that differ from the relaxed solution's in the best solution; None if none is better than `excess`."""
        self._try_pairs(unit)
        over, cost = np.zeros(1), np.zeros(1)
        for choices, raising, lowering in self._units(unit):
            # The first option leaves the unit as it is.
            num = len(over)
            over = np.concatenate([over, *(over + self.heavier[c] for c in choices)])
            cost = np.concatenate([cost, *(cost + self.reduced[c] for c in choices)])
            option, parent = np.repeat([-1, *choices], num), np.arange(len(over)) % num
            if (best := self._better(over, cost)) is not None:
                self._best = self._path(int(parent[best]), int(option[best]))
            kept = self._kept(over, cost, raising, lowering)
            over, cost = over[kept], cost[kept]
            self._steps.append((parent[kept], option[kept]))
            if not len(kept):
                break
        return self._best

    def _try_pairs(self, unit: np.ndarray) -> None:
        """Look at what differs in one or two units: a good solution early leaves little to search."""
        changed = self._changed()
        changed = changed[np.argsort(self.reduced[changed], kind="stable")[:_MOST_PAIRED]]
        if not len(changed):
            return
        first, second = (changed[places] for places in np.triu_indices(len(changed)))
        possible = (first == second) | (unit[first] != unit[second])
        first, second = first[possible], second[possible]
        two = first != second
        over, cost = (values[first] + two * values[second] for values in (self.heavier, self.reduced))
        if (best := self._better(over, cost)) is not None:
            self._best = [int(first[best]), int(second[best])]

    def _units(self, unit: np.ndarray) -> Iterator[tuple[np.ndarray, float, float]]:
        """The choices of each unit that could be in a better solution, units with the cheapest changes first.

        With them, the least reduced cost at which later units become heavier and lighter, per unit of weight.
        """
        changed = self._changed()
        if not len(changed):
            return
        ratio = self.reduced[changed] / np.abs(self.heavier[changed])
        up = self.heavier[changed] > 0
        first = np.concatenate([[0], np.flatnonzero(np.diff(unit[changed])) + 1])
        raising, lowering = (np.minimum.reduceat(np.where(kind, ratio, np.inf), first) for kind in (up, ~up))
        order = np.argsort(np.minimum(raising, lowering), kind="stable")
        groups = np.split(changed, first[1:])
        for place, (later_up, later_down) in enumerate(zip(_later(raising[order]), _later(lowering[order]), strict=True)):
            own = groups[order[place]]
            yield own[self.reduced[own] < self.excess - self.tolerance], later_up, later_down

    def _changed(self) -> np.ndarray:
        """Choices other than the relaxed ones that could be in a better solution than the best known."""
        return np.flatnonzero((self.reduced < self.excess - self.tolerance) & (self.heavier != 0))

    def _better(self, over: np.ndarray, cost: np.ndarray) -> int | None:
        """The best of the states that are solutions as they stand, if it is better than what is known."""
        excess = np.where(over <= self.slack, cost + self.price * (self.slack - over), np.inf)
        best = int(excess.argmin())
        if excess[best] >= self.excess:
            return None
        self.excess = float(excess[best])
        return best

    def _path(self, state: int, option: int) -> list[int]:
        """The changed choices of a state, from its parent among the last step's and its own choice."""
        found = [option]
        for parents, options in reversed(self._steps):
            found.append(int(options[state]))
            state = int(parents[state])
        return [choice for choice in found if choice >= 0]

    def _kept(self, over: np.ndarray, cost: np.ndarray, raising: float, lowering: float) -> np.ndarray:
        """The states that a better solution may come from: promising, and not dominated."""
        room = self.slack - over
        with np.errstate(invalid="ignore"):
            ahead = cost + np.where(room >= 0, room * min(self.price, raising), -room * lowering)
        kept = np.flatnonzero(ahead < self.excess - self.tolerance)
        kept = kept[_undominated(over[kept], (cost - self.price * over)[kept])]
        if len(kept) > _MOST_STATES:
            kept = kept[np.argsort(ahead[kept], kind="stable")[:_MOST_STATES]]
        return kept


def _later(values: np.ndarray) -> np.ndarray:
    """The least of all that come after each; infinity after the last."""
    return np.concatenate([np.minimum.accumulate(values[:0:-1])[::-1], [np.inf]])


def _undominated(over: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Places of the states than which no other is at most as heavy and scores at most as much."""
    order = np.lexsort((score, over))
    ordered = score[order]
    lower = np.concatenate([[True], ordered[1:] < np.minimum.accumulate(ordered)[:-1]])[: len(order)]
    return order[lower]
