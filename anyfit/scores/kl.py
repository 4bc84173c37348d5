"""Measured sensitivity: disturb one unit, look at the outputs of the whole network.

For each unit the probe choice takes its place alone; the divergence that this causes, over the probe's own
output error, is what the unit's other choices are scaled by. One pass over the reference tokens per unit.
"""

from __future__ import annotations

from anyfit.elastic.model import ElasticModel
from anyfit.progress import Progress
from anyfit.scores.base import Errors, Sensitivity, probe
from anyfit.tasks.language import Reference, kl


class MeasuredKL(Sensitivity):
    name = "kl"

    def measure(self, elastic: ElasticModel, reference: Reference, errors: Errors, progress: Progress) -> dict[str, float]:
        found = {}
        with progress.stage("probe units", len(elastic.space.decisions)) as stage:
            for decision in elastic.space.decisions:
                name = decision.unit.name
                choice = probe(errors[name])
                with elastic.disturbed(decision, choice) as model:
                    divergence = kl(model, reference)
                error = errors[name][choice]
                found[name] = divergence / error if error > 0 else 0.0
                stage.advance(detail=name)
        return found


SENSITIVITY = MeasuredKL()
