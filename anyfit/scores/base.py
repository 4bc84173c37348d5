"""The contract of a sensitivity: nats per token that a unit of output error costs, one number a unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from anyfit.elastic.model import ElasticModel
from anyfit.progress import Progress
from anyfit.tasks.language import Reference

Errors = Mapping[str, Mapping[str, float]]
"""{unit: {choice: expected squared error of its outputs}}."""


class Sensitivity(ABC):
    """Stateless. The elastic model comes in, and is left, as the original."""

    name: str

    @abstractmethod
    def measure(self, elastic: ElasticModel, reference: Reference, errors: Errors, progress: Progress) -> dict[str, float]:
        """By unit name: expected KL of the outputs to the original's, per squared error of the unit's outputs."""


def probe(errors: Mapping[str, float]) -> str:
    """The choice to disturb a unit with: the one of median error among those that change it at all."""
    changed = sorted((error, name) for name, error in errors.items() if error > 0)
    return changed[len(changed) // 2][1] if changed else min(errors)
