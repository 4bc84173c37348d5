"""What a pruned network is made of: every attention and feed-forward at every size, in every format.

What is taken out of an attention or a feed-forward shows in the matrix that reads it: its inputs say which structures matter least, and
how the rest makes good for them (`anyfit.importance`). So that matrix is made for each size by itself, as repairing changes all of it,
and then quantised for the inputs that are left. The order in which structures go is the same for all sizes, so that each is a part of
the larger ones; the other matrices only lose rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from anyfit.calibration.collect import Moments
from anyfit.calibration.statistics import InputStatistics
from anyfit.core.config import format_of
from anyfit.core.space import Decision, Space
from anyfit.core.units import Unit, Weight
from anyfit.elastic.stream import ElasticStream
from anyfit.encoding import Encoder, Encoding, Matrices
from anyfit.family.store import ORDER, Store
from anyfit.formats import formats
from anyfit.formats.base import Format
from anyfit.importance.base import Importance, squared_error
from anyfit.modeling_cut import spread
from anyfit.progress import Progress, Stage
from anyfit.quantizers.base import Encoded
from anyfit.quantizers.inputs import with_inputs
from anyfit.scores.base import Sensitivity, probe
from anyfit.scores.table import Table
from anyfit.structure.levels import Structure, filled, first, kept_of

NONE = torch.zeros(1, dtype=torch.float64)
"""No error."""


@dataclass(frozen=True)
class Structuring(Encoding):
    """`structures`, and which of them matter, by the name of the matrix that reads them."""

    structures: Mapping[str, Structure]
    importance: Callable[[str], Importance]

    name = "calibrate, prune and encode"

    @contextmanager
    def encoder(self, stage: Stage) -> Iterator[Encoder]:
        with super().encoder(stage) as rest:
            yield _Pruner(self, rest, stage)

    @cached_property
    def choices(self) -> dict[str, tuple[str, ...]]:
        """{weight: what its variants are called}: of a matrix that reads structures each size in each format, of others the formats."""
        found = {w.name: [c.name for c in d.choices] for d in self.space.decisions for w in d.unit.weights}
        return {
            name: tuple(names) if name in self.structures else tuple(dict.fromkeys(map(format_of, names))) for name, names in found.items()
        }


@dataclass(frozen=True)
class _Pruner:
    """`rest` encodes the matrices that read no structures."""

    structuring: Structuring
    rest: Encoder
    stage: Stage

    def encode(self, groups: list[Matrices], moments: dict[str, Moments]) -> None:
        """Each process prunes some of the matrices."""
        run = self.structuring
        readers = [group[0] for group in groups if group[0].name in run.structures]
        names = {weight.name for weight in readers}
        self.rest.encode([group for group in groups if group[0].name not in names], moments)
        by_input = {str(weight.input): weight for weight in readers}  # nothing else reads what structures put out
        sizes = {name: weight.num_weights for name, weight in by_input.items()}
        for name, statistics in run.statistics(sizes, moments):
            if statistics:
                self._prune(by_input[name], statistics)
            self.stage.advance(detail=by_input[name].name)

    def _prune(self, weight: Weight, statistics: InputStatistics) -> None:
        run, structure, hessian = self.structuring, self.structuring.structures[weight.name], statistics.hessian.cpu()
        matrix = run.rows(weight, slice(None))
        wanted: dict[int, dict[str, Format]] = {}
        shapes: dict[str, tuple[int, int]] = {}
        for name in run.choices[weight.name]:
            kept, format_ = kept_of(name), formats.get(format_of(name))
            assert kept is not None, name
            wanted.setdefault(kept, {})[name] = format_
            shape = (len(matrix), kept * structure.size)
            shapes[name] = (format_.data_rows(shape), format_.row_bytes(shape[1])) if kept else shape
        ladder = run.importance(weight.name).ladder(matrix, hessian, structure.size)
        order = ladder.order.contiguous().view(torch.uint8)[None]
        with run.store.writing(weight.name, {**shapes, ORDER: (1, order.shape[1])}) as writing:
            writing.put(ORDER, 0, Encoded(order, NONE))
            for kept, grids in wanted.items():
                columns = spread(first(ladder.order, kept), structure.size)
                level, left = ladder.level(kept)[:, columns].contiguous(), hessian[columns][:, columns].contiguous()
                prepared = run.quantizer.prepare(InputStatistics(left, statistics.count), list(grids.values())) if kept else None
                for name, grid in grids.items():
                    nothing = Encoded(torch.empty(len(level), 0, dtype=torch.uint8), NONE)
                    made = run.quantizer.encode(level, prepared, grid) if kept else nothing
                    rounded = with_inputs(grid, made, statistics.spread) if kept else made
                    lost = matrix - filled(grid.decode(made.data) if kept else level, ladder.order, matrix.shape[1])
                    error = squared_error(lost, hessian) + rounded.error - made.error
                    writing.put(name, 0, Encoded(rounded.data, torch.tensor([error], dtype=torch.float64), made.notes))


def table(
    elastic: ElasticStream,
    store: Store,
    structures: Mapping[str, Structure],
    dense: str,
    sensitivity: Sensitivity,
    tokens: Tensor,
    scored: Mapping[str, Tensor],
    progress: Progress,
) -> Table:
    """Expected divergence of every choice: what was taken out and what was rounded are measured by themselves, as a unit of error weighs
    differently in them, and add up.

    `scored`: what each structure costs by a network importance, which then takes the place of output errors; one factor for each axis
    makes it nats. Empty where no such importance was asked.
    """
    space, found = elastic.space, {}
    errors = {w.name: store.errors(w.name) for d in space.decisions for w in d.unit.weights}
    cut, rounded = list[Decision](), list[Decision]()
    cut_errors, rounded_errors = dict[str, dict[str, float]](), dict[str, dict[str, float]]()
    for decision in space.decisions:
        name, structure = decision.unit.name, structures.get(decision.unit.name)
        if structure is None:
            rounded.append(decision)
            rounded_errors[name] = {c.name: sum(errors[w.name][c.name] for w in decision.unit.weights) for c in decision.choices}
            continue
        levels = [c for c in decision.choices if format_of(c.name) == dense]
        cut.append(replace(decision, unit=Unit(name, (structure.reader,)), choices=tuple(levels)))
        cut_errors[name] = {c.name: _removed(scored[name], kept_of(c.name) or 0) if scored else errors[name][c.name] for c in levels}
        grids = [c for c in decision.choices if kept_of(c.name) == structure.num]
        rounded.append(replace(decision, choices=tuple(grids)))
        rounded_errors[name] = {c.name: _rounding(errors, structure, c.name, dense) for c in grids}
    for label, decisions, own in (("cut", cut, cut_errors), ("rounded", rounded, rounded_errors)):
        if any(error > 0 for row in own.values() for error in row.values()):
            part = replace(elastic, space=Space(tuple(decisions), 0, 0, space.num_parameters, space.others))
            found[label] = sensitivity.measure(part, tokens, own, progress)
    none = dict.fromkeys(errors, 0.0)
    by_cut, by_rounding = found.get("cut", none), found.get("rounded", none)
    if scored and "cut" in found:
        by_cut = _by_axis(by_cut, cut_errors, structures)
    scores: dict[str, dict[str, float]] = {}
    for decision in space.decisions:
        name, structure = decision.unit.name, structures.get(decision.unit.name)
        if structure is None:
            scores[name] = {c: by_rounding[name] * error for c, error in rounded_errors[name].items()}
            continue
        scores[name] = {
            c.name: by_cut[name] * cut_errors[name][structure.choice(kept_of(c.name) or 0, dense)]
            + by_rounding[name] * _rounding(errors, structure, c.name, dense)
            for c in decision.choices
        }
    return Table(dict.fromkeys(scores, 1.0), scores)


def _removed(scores: Tensor, kept: int) -> float:
    """What the structures of least score cost together when so many others are kept."""
    return float(scores.sort(descending=True).values[kept:].sum())


def _by_axis(
    sensitivities: Mapping[str, float], errors: Mapping[str, Mapping[str, float]], structures: Mapping[str, Structure]
) -> dict[str, float]:
    """One sensitivity for each axis: what all probes cost, over what they were expected to."""
    expected, cost = Counter[str](), Counter[str]()
    for name, structure in structures.items():
        probed = errors[name][probe(errors[name])]
        expected[structure.axis] += probed  # type: ignore[assignment]
        cost[structure.axis] += probed * sensitivities[name]  # type: ignore[assignment]
    return {name: cost[s.axis] / expected[s.axis] if expected[s.axis] else 0.0 for name, s in structures.items()}


def _rounding(errors: Mapping[str, Mapping[str, float]], structure: Structure, choice: str, dense: str) -> float:
    """Squared output error that the format of a choice adds to that of its size; matrices that lose rows lose their share of it."""
    kept = kept_of(choice) or 0
    own = errors[structure.reader.name]
    added = max(0.0, own[choice] - own[structure.choice(kept, dense)])
    return added + sum(errors[weight.name][format_of(choice)] for weight in structure.rest) * kept / structure.num
