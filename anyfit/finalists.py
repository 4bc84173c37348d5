"""Which configs a family has measured: optima along the frontier, every uniform setting, and what searching and more effort add."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from anyfit.core.budget import WHOLE, Budget, describe, units
from anyfit.core.config import Config
from anyfit.core.effort import Effort
from anyfit.core.files import read_json, write_json
from anyfit.core.memory import release
from anyfit.core.space import Space
from anyfit.elastic.model import ElasticModel
from anyfit.elastic.stream import ElasticStream
from anyfit.family.manifest import Point
from anyfit.family.store import Store, refined_file
from anyfit.progress import Progress
from anyfit.scores.table import Table
from anyfit.searchers import searchers
from anyfit.searchers.base import Fitness, Subject
from anyfit.searchers.exact import hull
from anyfit.streaming import Numbers, Predictions
from anyfit.tasks import quality_from_json, task_of
from anyfit.tasks.base import Quality, Reference, Task
from anyfit.tuning.coded import Stored
from anyfit.tuning.refining import Refinery

NUM_FINALISTS = 7
"""Budgets, evenly spaced in the logarithm of the size, whose best configs are measured; besides, one for the size
of each uniform setting."""
MOST_TIMES_SMALLER = 1000
"""Than the largest of these sizes is the smallest, should a network of no parts take no time."""
NEGLIGIBLE = 3e-5
"""Of the loss (nats per token, or one less a cosine): a larger config than the first below this has nothing left to gain."""
NUM_REFINED = 2
"""Of these budgets, the smallest, whose best configs are refined at high effort: there is most to gain there."""
EXACT, EVOLUTION = "exact", "evolution"
"""Searchers: the one whose configs always compete, and the one that high effort adds."""
WORK = ("points", "searched")
"""Folders of the journal that a finished family doesn't keep."""


def measuring(search: str, effort: Effort) -> dict[str, int]:
    """{searcher: sizes, the smallest first} of those that measure configs, where `search` was asked for."""
    found = {EVOLUTION: NUM_REFINED} if effort.refines else {}
    return found if search == EXACT else found | {search: NUM_FINALISTS}


@dataclass
class Finalists:
    """One run's finalists. What is measured and refined is kept in the journal's folder, and not done twice.

    `in_memory` makes a network of which searchers run many configs on little text, and which high effort refines. `texts`: the
    search and the report split; `calibration`: text that neither holds, so that the search split judges what was searched on it.
    (segments, length) each. `search`: the searcher whose configs compete with the exact optima.
    """

    store: Store
    table: Table
    elastic: ElasticStream
    in_memory: Callable[[], ElasticModel]
    texts: Mapping[str, Tensor]
    calibration: Tensor
    effort: Effort
    search: str
    progress: Progress
    _searching: dict[int, Reference] = field(default_factory=dict, repr=False)

    @property
    def space(self) -> Space:
        return self.elastic.space

    @cached_property
    def references(self) -> dict[str, Reference]:
        """The original's predictions on each text."""
        predictions = self._predictions(self.elastic.original)
        return {name: self._task.reference(predictions, tokens) for name, tokens in self.texts.items()}

    @cached_property
    def _task(self) -> Task:
        return task_of(self.elastic.stream.model.config)

    def _predictions(self, numbers: Numbers) -> Predictions:
        """Of a network on all texts, which are read in one pass."""
        return self.elastic.stream.predictions(torch.cat(list(self.texts.values())), numbers)

    @cached_property
    def _network(self) -> ElasticModel:
        return self.in_memory()

    def points(self) -> list[Point]:
        """All of them measured, not refined."""
        # Exact optima first: where a uniform setting is one of them, it is then named as such.
        candidates: dict[Config, str | None] = dict.fromkeys(self._optima())
        candidates |= dict.fromkeys(self._searched())
        candidates |= {self.space.uniform(name): name for name in self.space.uniforms()}
        with self.progress.stage("measure finalists", len(candidates)) as stage:
            for index, (config, uniform) in enumerate(candidates.items()):
                if self.elastic.group.owns(index):
                    self.point(config, uniform)
                    release()
                stage.advance()
        self.elastic.group.wait()
        return [self.point(config, uniform) for config, uniform in candidates.items()]

    def refined(self, points: list[Point], refinery: Refinery, stored: Callable[[Config], list[Stored]]) -> list[Point]:
        """The points, the best within each of the smallest budgets refined where that helps. `stored`: a config's matrices."""
        found = {point.config: point for point in points}
        best = [min((p for p in points if self._size(p.config) <= size), key=_measured) for size in self._smallest()]
        for point in dict.fromkeys(best):
            found[point.config] = self._refined(point, refinery, stored)
        return list(found.values())

    @cached_property
    def _sizes(self) -> tuple[list[float], float, float]:
        """Evenly spaced sizes, and the smallest and largest of them."""
        best = hull(self.space, self.table)
        enough = next((config for config in best if self.table.predict(self.space, config) < NEGLIGIBLE), best[-1])
        smallest, largest = self._size(best[0]), self._size(enough)
        whole, ladder = WHOLE.get(self.space.scale, 1), np.geomspace(max(smallest, largest / MOST_TIMES_SMALLER), largest, NUM_FINALISTS)
        return [units(self.space.scale, size) * whole for size in ladder], smallest, largest

    def _size(self, config: Config) -> float:
        return self.space.costs(config)[self.space.scale]

    def _budget(self, size: float) -> Budget:
        return Budget(((self.space.scale, float(size)),), describe(self.space.scale, size))

    def _smallest(self) -> list[float]:
        return self._sizes[0][:NUM_REFINED]

    def _optima(self) -> list[Config]:
        sizes, smallest, largest = self._sizes
        uniform = {self._size(self.space.uniform(name)) for name in self.space.uniforms()}
        along = sorted({*sizes, *(size for size in uniform if smallest <= size <= largest)})
        return searchers.get(EXACT).search(self.subject, [self._budget(size) for size in along])

    def _searched(self) -> list[Config]:
        """What is found by measuring configs. The first process does that, the others find the same in what it has measured."""
        if not self.elastic.group.first:
            self.elastic.group.wait()
        subject, found = self.subject, list[Config]()
        for name, number in measuring(self.search, self.effort).items():
            found += searchers.get(name).search(subject, [self._budget(size) for size in self._sizes[0][:number]])
        if self.elastic.group.first:
            self.elastic.group.wait()
        return found

    @property
    def subject(self) -> Subject:
        return Subject(self.space, self.table, self._fitness, self.progress)

    def _fitness(self, num_segments: int) -> Fitness:
        path = self.store.folder / "searched" / f"{num_segments}.json"
        known: dict[str, float] = read_json(path) or {}

        def measured(config: Config) -> float:
            if config.digest not in known:
                known[config.digest] = self._reference(num_segments).loss(self._network.set(config))
                write_json(path, known)
            return known[config.digest]

        return measured

    def _reference(self, num_segments: int) -> Reference:
        """The original's predictions on text that is searched with."""
        if num_segments not in self._searching:
            text = self.calibration[:num_segments]
            self._searching[num_segments] = self._task.reference(self.elastic.stream.predictions(text, self.elastic.original), text)
        return self._searching[num_segments]

    def point(self, config: Config, uniform: str | None = None) -> Point:
        """A config, measured. `uniform`: its name, where it is the same choice everywhere."""
        path = self.store.folder / "points" / f"{config.digest}.json"
        found = read_json(path)
        if found is None:
            references = self.references
            predictions = self._predictions(self.elastic.numbers(config))
            found = {name: reference.measured(predictions).to_json() for name, reference in references.items()}
            write_json(path, found)
        return Point(
            config=config,
            bytes_=self.space.bytes_(config),
            bits=self.space.bits(config),
            predicted=self.table.predict(self.space, config),
            uniform=uniform,
            search=quality_from_json(found["search"]),
            report=quality_from_json(found["report"]),
        )

    def _refined(self, point: Point, refinery: Refinery, stored: Callable[[Config], list[Stored]]) -> Point:
        path = self.store.folder / "points" / f"{point.config.digest}-refined.json"
        found = read_json(path)
        if found is None:
            with self._network.lent(point.config) as model:
                made = refinery.refine(model, stored(point.config), self.progress)
                quality = {name: reference.measured(model) for name, reference in self.references.items()}
            better = refined(point, quality)
            if better.refined:
                self.store.write_tensors(refined_file(point.config), made.data)
            found = {name: entry.to_json() for name, entry in quality.items()}
            write_json(path, found)
        return refined(point, {name: quality_from_json(entry) for name, entry in found.items()})


def refined(point: Point, quality: Mapping[str, Quality]) -> Point:
    """The point as it is once refined; as it was where that didn't help on the search split."""
    better = replace(point, search=quality["search"], report=quality["report"], unrefined=_measured(point))
    return better if _measured(better) < _measured(point) else point


def _measured(point: Point) -> float:
    assert point.search is not None
    return point.search.loss
