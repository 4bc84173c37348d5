"""A space and its table as flat arrays: what searchers compute with."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from anyfit.core.budget import BITS, BYTES, Budget, allowed, units
from anyfit.core.config import Config
from anyfit.core.space import Space
from anyfit.scores.table import Table


@dataclass(frozen=True)
class Problem:
    """All choices of all units, unit after unit: one entry a choice. A config is one index a unit, (units,)."""

    space: Space
    unit: np.ndarray
    score: np.ndarray
    bytes_: np.ndarray
    stored: np.ndarray
    others: Mapping[str, np.ndarray]
    names: tuple[str, ...]

    @classmethod
    def of(cls, space: Space, table: Table) -> Problem:
        rows = [
            (i, table.score(d.unit.name, c.name), c.bytes_, c.stored_bytes, c.name)
            for i, d in enumerate(space.decisions)
            for c in d.choices
        ]
        unit, score, bytes_, stored, names = zip(*rows, strict=True)
        others = {cost: np.array([units(cost, c.others[cost]) for d in space.decisions for c in d.choices], float) for cost in space.others}
        return cls(space, np.array(unit), np.array(score), np.array(bytes_, float), np.array(stored, float), others, names)

    def config(self, chosen: np.ndarray) -> Config:
        return Config({d.key: self.names[i] for d, i in zip(self.space.decisions, chosen, strict=True)})

    def chosen(self, config: Config) -> np.ndarray:
        """The inverse of `config`."""
        place = {(int(unit), name): i for i, (unit, name) in enumerate(zip(self.unit, self.names, strict=True))}
        return np.array([place[i, config[d.key]] for i, d in enumerate(self.space.decisions)])

    def sizes(self, cost: str) -> np.ndarray:
        """What each choice adds to a cost: whole numbers, of bytes for the first two."""
        return {BYTES: self.bytes_, BITS: self.stored, **self.others}[cost]

    def left(self, cost: str, bound: float) -> int:
        """What a limit leaves for the choices, after everything that is fixed, in whole numbers as `sizes` are."""
        if cost in self.others:
            return allowed(cost, bound) - units(cost, self.space.others[cost])
        if cost == BYTES:
            return math.floor(bound) - self.space.fixed_bytes
        num = self.space.num_parameters
        stored = math.floor(bound * num / 8)
        # Exactly those that `Space.bits` finds within the bound, however the division above was rounded.
        stored += 8 * (stored + 1) / num <= bound
        stored -= 8 * stored / num > bound
        return stored - self.space.fixed_stored_bytes

    def limits(self, budget: Budget) -> tuple[np.ndarray, np.ndarray]:
        """Sizes (limits, choices) and what is left for them (limits,)."""
        sizes = [self.sizes(cost) for cost, _ in budget.limits]
        return np.stack(sizes), np.array([self.left(cost, bound) for cost, bound in budget.limits], float)
