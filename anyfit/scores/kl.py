"""Measured sensitivity: disturb one unit, look at the outputs of the whole network.

For each unit the probe choice takes its place alone; the divergence that this causes, over the probe's own
output error, is what the unit's other choices are scaled by. Each unit costs a pass over the text through its block
and all later ones, so the time grows with the square of the number of blocks: `fisher` doesn't.
"""

from __future__ import annotations

from torch import Tensor

from anyfit.elastic.stream import ElasticStream
from anyfit.progress import Progress
from anyfit.scores.base import Errors, Sensitivity, disturbance
from anyfit.tasks.language import Reference


class MeasuredKL(Sensitivity):
    name = "kl"

    def measure(self, elastic: ElasticStream, tokens: Tensor, errors: Errors, progress: Progress) -> dict[str, float]:
        stream, found = elastic.stream, {}
        trace = stream.trace(tokens, elastic.original)
        reference = Reference.of(stream.predictions(tokens, elastic.original, trace[-1]), tokens)
        with progress.stage("probe units", len(elastic.space.decisions)) as stage:
            for index, decision in enumerate(elastic.space.decisions):
                name = decision.unit.name
                if elastic.group.owns(index):
                    found[name] = disturbance(elastic, decision, trace, reference, errors[name])
                stage.advance(detail=name)
        return {name: value for part in elastic.group.gathered(found) for name, value in part.items()}


SENSITIVITY = MeasuredKL()
