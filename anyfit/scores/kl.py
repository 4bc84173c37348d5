"""Measured sensitivity: disturb one unit, look at the outputs of the whole network.

For each unit the probe choice takes its place alone; the divergence that this causes, over the probe's own
output error, is what the unit's other choices are scaled by. Each probe costs a pass over the text through the unit's block
and all later ones. So that the time grows with the number of blocks and not with its square, only some blocks of a deep network
are probed, evenly spread. The units of the others have their Fisher information (`anyfit.scores.fisher`), times what probes came to
over it for units of the same role: interpolated over depth, in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from anyfit.core.space import Decision
from anyfit.elastic.stream import ElasticStream
from anyfit.progress import Progress
from anyfit.scores import fisher
from anyfit.scores.base import Errors, Sensitivity, disturbance
from anyfit.tasks import task_of

NUM_PROBED = 4
"""Blocks. On the embedded default the mixes that two of its six lead to can't be told from those that all lead to, by what they lose."""


@dataclass(frozen=True)
class MeasuredKL(Sensitivity):
    """`num_probed`: blocks of each role, or None for all."""

    num_probed: int | None = NUM_PROBED
    name = "kl"

    def measure(self, elastic: ElasticStream, tokens: Tensor, errors: Errors, progress: Progress) -> dict[str, float]:
        decisions = elastic.space.decisions
        probed = list(_probed(decisions, self.num_probed))
        measured = _measure(elastic, probed, tokens, errors, progress)
        if len(probed) == len(decisions):
            return measured
        inside = [decision for decision in decisions if decision.unit.weights[0].block is not None]
        return _interpolated(inside, measured, fisher.information(elastic, inside, tokens, progress)) | measured


def num_probes(decisions: Iterable[Decision]) -> int:
    """How many units `MeasuredKL` disturbs."""
    return sum(1 for _ in _probed(decisions, NUM_PROBED))


def _probed(decisions: Iterable[Decision], most: int | None) -> Iterable[Decision]:
    """All units outside the blocks, and those of some of the blocks that have their role: the first, the last, and between."""
    decisions = list(decisions)
    blocks = {role: sorted({block for _, block in own}) for role, own in _by_role(decisions).items()}
    chosen = {role: {own[round(place)] for place in np.linspace(0, len(own) - 1, most or len(own))} for role, own in blocks.items()}
    return (d for d in decisions if d.unit.weights[0].block is None or d.unit.weights[0].block in chosen[d.unit.weights[0].role])


def _by_role(decisions: Iterable[Decision]) -> dict[str, list[tuple[str, int]]]:
    """{role: (unit, block)} of what is in a block."""
    found: dict[str, list[tuple[str, int]]] = {}
    for decision in decisions:
        weight = decision.unit.weights[0]
        if weight.block is not None:
            found.setdefault(weight.role, []).append((decision.unit.name, weight.block))
    return found


def _measure(elastic: ElasticStream, decisions: list[Decision], tokens: Tensor, errors: Errors, progress: Progress) -> dict[str, float]:
    stream, found = elastic.stream, {}
    trace = stream.trace(tokens, elastic.original)
    reference = task_of(stream.model.config).reference(stream.predictions(tokens, elastic.original, trace[-1]), tokens)
    with progress.stage("probe units", len(decisions)) as stage:
        for index, decision in enumerate(decisions):
            name = decision.unit.name
            if elastic.group.owns(index):
                found[name] = disturbance(elastic, decision, tokens, trace, reference, errors[name])
            stage.advance(detail=name)
    return {name: value for part in elastic.group.gathered(found) for name, value in part.items()}


def _interpolated(decisions: Iterable[Decision], measured: Mapping[str, float], information: Mapping[str, float]) -> dict[str, float]:
    """The information of every unit, in the measure of what was measured near it."""
    found = {}
    for own in _by_role(decisions).values():
        ratios, means = {}, {}
        for block in sorted({block for name, block in own if name in measured}):
            names = [name for name, place in own if place == block and name in measured]
            sums = [sum(values[name] for name in names) for values in (measured, information)]
            means[block] = sums[0] / len(names)
            if min(sums) > 0:
                ratios[block] = math.log(sums[0] / sums[1])
        for name, block in own:
            if information[name] > 0:
                found[name] = information[name] * (math.exp(np.interp(block, list(ratios), list(ratios.values()))) if ratios else 1.0)
            else:  # a network may use a matrix without calling its module, and then no gradient is seen
                found[name] = float(np.interp(block, list(means), list(means.values())))
    return found


SENSITIVITY = MeasuredKL()
