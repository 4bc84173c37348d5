"""Refining one size of a family: its matrices are solved again for each other.

Takes the time of a few calibration passes and of one encoding, for one config. The result is kept where it is
closer to the original on the search text; the family then holds it as a point of its own, and every budget may
choose it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from anyfit.architectures import architecture_of
from anyfit.calibration.statistics import InputStatistics
from anyfit.checkpoint import Checkpoint
from anyfit.core.budget import Budget
from anyfit.core.config import Config
from anyfit.core.errors import ModelError
from anyfit.core.files import sha256, write_json
from anyfit.core.units import Weight
from anyfit.family.family import Family, with_points
from anyfit.family.manifest import NAME, Point
from anyfit.family.store import REFINED, Store, refined_file
from anyfit.formats import formats
from anyfit.pipeline import one_thread
from anyfit.progress import Progress, Silent
from anyfit.quantizers import quantizers
from anyfit.recipes import recipes
from anyfit.report.page import write as write_page
from anyfit.targets import targets
from anyfit.tasks.language import Quality, Reference, measure
from anyfit.tuning.sequential import resolve
from anyfit.zoo import MODEL


@dataclass(frozen=True)
class Refined:
    """What came of it: quality on the search text before and after, and the point that the family has now."""

    point: Point
    before: Quality
    after: Quality

    @property
    def kept(self) -> bool:
        return self.after.kl_mean < self.before.kl_mean


def refine(
    family: Family, budget: str | Sequence[str] | Budget, *, model: str | Path | None = None, progress: Progress | None = None
) -> Refined:
    """Refine the config that `budget` chooses; the family's folder gains a file and a point where that helps.

    `model`: the original, where it isn't at the place any more that the family was made from. Raises `ModelError` where it
    isn't the very one. A config that is refined already is left alone.
    """
    progress = progress or Silent()
    chosen = family.select_unrefined(budget)
    if chosen.refined:
        assert chosen.search is not None
        return Refined(chosen, chosen.search, chosen.search)
    checkpoint = _original(family, model)
    original, stored = checkpoint.load(), family.extract(chosen.config)
    text = family.text()
    references = {name: Reference.of(original, text[name]) for name in ("search", "report")}
    before = chosen.search or measure(stored, references["search"])
    solver = _Solver(family, chosen.config)
    weights = [weight for decision in family.space.decisions for weight in decision.unit.weights]
    resolve(stored, original, architecture_of(original), weights, text["calibration"], solver.encode, progress=progress)
    quality = {name: measure(stored, reference) for name, reference in references.items()}
    point = replace(chosen, search=quality["search"], report=quality["report"], refined=True)
    result = Refined(point, before, quality["search"])
    if not result.kept:
        return replace(result, point=chosen)
    _keep(family, point, solver.data)
    return result


def _original(family: Family, model: str | Path | None) -> Checkpoint:
    trusted = family.manifest.trust_remote_code
    place = model if model is not None else MODEL if family.original.embedded else family.original.name
    checkpoint = Checkpoint.open(place, trust_remote_code=trusted)
    if checkpoint.digest != family.original.digest:
        raise ModelError(
            f"{checkpoint.name} isn't the network that {family.path} was made of: its content differs.",
            remedy="Name the original with --model.",
        )
    return checkpoint


class _Solver:
    """Encodes matrices in the formats of a config, with the family's own recipe, and keeps the bytes."""

    def __init__(self, family: Family, config: Config) -> None:
        self.data: dict[str, Tensor] = {}
        self._family = family
        self._formats = {w.name: config[d.key] for d in family.space.decisions for w in d.unit.weights}
        self._quantizer = quantizers.get(recipes.get(family.manifest.recipe).quantizer)
        self._target = targets.get(family.target)

    def encode(self, weights: Sequence[Weight], wanted: Sequence[Tensor], statistics: InputStatistics) -> list[Tensor]:
        """See `tuning.sequential.Encode`."""
        with one_thread() as pool:
            return pool.submit(self._encode, weights, wanted, statistics).result()

    def _encode(self, weights: Sequence[Weight], wanted: Sequence[Tensor], statistics: InputStatistics) -> list[Tensor]:
        prepared = self._quantizer.prepare(statistics)
        values = []
        for weight, matrix in zip(weights, wanted, strict=True):
            format_ = formats.get(self._formats[weight.name])
            order = self._target.row_order(self._family.source, weight)
            order = torch.arange(len(matrix)) if order is None else order
            data = self._quantizer.encode(matrix[order].contiguous(), prepared, format_).data
            self.data[weight.name] = data
            values.append(torch.empty_like(matrix).index_copy_(0, order, format_.decode(data)))
        return values


def _keep(family: Family, point: Point, data: dict[str, Tensor]) -> None:
    """Write the matrices, then the manifest that names them: killed in between, the family is as it was."""
    name = refined_file(point.config)
    (family.path / REFINED).mkdir(exist_ok=True)
    Store(family.path).write_tensors(name, data)
    others = [other for other in family.manifest.points if other.config != point.config]
    files = {**family.manifest.files, name: sha256(family.path / name)}
    manifest = with_points(family.manifest, [*others, point], files)
    write_json(family.path / NAME, manifest.to_json())
    write_page(Family(family.path, manifest), family.path / "report.html")
