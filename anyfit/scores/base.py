"""The contract of a sensitivity: what a unit of output error costs of the task's loss, one number a unit."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from torch import Tensor

from anyfit.core.space import Decision
from anyfit.elastic.stream import ElasticStream
from anyfit.progress import Progress
from anyfit.streaming import States
from anyfit.tasks.base import Reference

Errors = Mapping[str, Mapping[str, float]]
"""{unit: {choice: expected squared error of its outputs}}."""


class Sensitivity(ABC):
    """Stateless."""

    name: str

    @abstractmethod
    def measure(self, elastic: ElasticStream, tokens: Tensor, errors: Errors, progress: Progress) -> dict[str, float]:
        """By unit name: expected loss of the outputs beside the original's, per squared error of the unit's outputs.

        `tokens` (segments, length): text to measure on.
        """


def probe(errors: Mapping[str, float]) -> str:
    """The choice to disturb a unit with: the one of median error among those that change it at all."""
    changed = sorted((error, name) for name, error in errors.items() if error > 0)
    return changed[len(changed) // 2][1] if changed else min(errors)


def disturbance(
    elastic: ElasticStream, decision: Decision, tokens: Tensor, trace: Sequence[States], reference: Reference, errors: Mapping[str, float]
) -> float:
    """The loss that the probe choice of one unit causes alone, per squared error. `trace`: the original's on the reference's `tokens`."""
    choice, stream = probe(errors), elastic.stream
    if not errors[choice] > 0:
        return 0.0
    numbers, first = elastic.disturbed(decision, choice), min(stream.first(weight) for weight in decision.unit.weights)
    final = stream.final(tokens, numbers, *((trace[first], first) if first >= 0 else ()))
    return reference.loss(stream.predictions(tokens, numbers, final)) / errors[choice]
