"""The contract of a searcher: configs that compete along a frontier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.space import Space
from anyfit.progress import Progress
from anyfit.scores.table import Table

Fitness = Callable[[Config], float]
"""What a config loses, measured: nats per token, the lower the better. The same each time it is asked."""


@dataclass(frozen=True)
class Ranked:
    """A config and its fitness, in the last stage where there are several."""

    config: Config
    fitness: float


@dataclass(frozen=True)
class Subject:
    """What is searched: `fitness` is that on so many segments of text, and dearer the more they are."""

    space: Space
    table: Table
    fitness: Callable[[int], Fitness]
    progress: Progress


class Searcher(ABC):
    """Stateless, and deterministic as far as the fitness is: a search that was stopped goes on by being asked again, as what was measured
    isn't measured again."""

    name: str

    @abstractmethod
    def search(self, subject: Subject, budgets: Sequence[Budget]) -> list[Config]:
        """A config for each budget, within it. Raises `BudgetError` where one can't be met."""

    def refuses(self, space: Space) -> str | None:
        """Why it can't search a space."""
        return None

    @abstractmethod
    def num_segments(self, num_budgets: int) -> int:
        """Segments of text that networks are run on, at most; none: the table is all that is asked."""
