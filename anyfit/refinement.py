"""Refining one size of a finished family: its matrices are solved again for each other, and tuned together; a network from which parts
were left out is trained.

Takes the time of some calibration passes and of one encoding, or that of training, for one config. The result is kept where it is
closer to the original on the search text; the family then holds it as a point of its own, and every budget may
choose it. At high effort, `fit` does the same to its smallest finalists; where a person says --recover, it trains for several budgets.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit import devices, recovery
from anyfit.architectures import architecture_of
from anyfit.checkpoint import Checkpoint
from anyfit.core.budget import BYTES, Budget, describe, memory_limit
from anyfit.core.errors import FamilyError, ModelError, OutputError, UserError
from anyfit.core.files import locked, sha256, write_json
from anyfit.family.family import Family, with_points
from anyfit.family.manifest import NAME, Point
from anyfit.family.store import REFINED, Store, refined_file, stored_matrices
from anyfit.finalists import refined
from anyfit.interface import LANGUAGE, interface_of
from anyfit.progress import Progress, Silent
from anyfit.quantizers import quantizers
from anyfit.recipes import recipes
from anyfit.recovery import Recovery, settled
from anyfit.report.page import write as write_page
from anyfit.targets import targets
from anyfit.targets.base import CutTarget
from anyfit.targets.hub_layout import DTYPES
from anyfit.tasks import task_of
from anyfit.tasks.base import Quality
from anyfit.tasks.language import Reference
from anyfit.tuning import refining
from anyfit.tuning.refining import Refinery, Settings
from anyfit.zoo import MODEL


@dataclass(frozen=True)
class Refined:
    """What came of it: quality on the search text before and after, and the point that the family has now.

    `already`: it was refined before, and nothing was done.
    """

    point: Point
    before: Quality
    after: Quality
    already: bool = False

    @property
    def kept(self) -> bool:
        return self.after.loss < self.before.loss


def refine(
    family: Family,
    budget: str | Sequence[str] | Budget,
    *,
    model: str | Path | None = None,
    settings: Settings | None = None,
    device: str = devices.AUTO,
    memory: str | None = None,
    progress: Progress | None = None,
) -> Refined:
    """Refine the config that `budget` chooses; the family's folder gains a file and a point where that helps.

    `model`: the original, a folder or hub id; needed unless it is the embedded one or what the family was named after still
    lies at hand. Raises `ModelError` where it isn't the very one. A config that is refined already is left alone. `device`:
    "cpu", "cuda" or "auto". `memory`: what may be used there, such as "8GB" (default: three quarters of what is free). `family` is up to
    date afterwards.
    """
    progress, where = progress or Silent(), devices.device(device)
    if family.masked:
        raise UserError(f"{family.path} was masked by {family.manifest.recipe}, and nothing trains masks.", remedy="Refine another family.")
    if interface_of(family.source.config) is not LANGUAGE and not family.pruned:
        raise UserError(f"{family.original.name} is no language model, and refining is about next tokens.", remedy="Take a larger budget.")
    chosen = family.select_unrefined(budget)
    if chosen.refined:
        assert chosen.search is not None
        return Refined(chosen, chosen.search, chosen.search, already=True)
    if family.pruned:
        _require_trainable(family, chosen)
    if not os.access(family.path, os.W_OK):
        raise OutputError(f"{family.path} can't be written to.", remedy="Copy the family to a folder of yours, and refine it there.")
    _require_memory(family, where, memory)
    checkpoint = _original(family, model)
    original, stored = (devices.moved(model, where) for model in (checkpoint.load(), family.extract(chosen.config)))
    text = family.text()
    task = task_of(checkpoint.config)
    references = {name: task.reference(original, text[name]) for name in ("search", "report")}
    before = chosen.search or references["search"].measured(stored)
    if family.pruned:
        data = _trained(family, chosen, stored, original, progress)
    else:
        quantizer, calibration = quantizers.get(recipes.get(family.manifest.recipe).quantizer), text["calibration"]
        held_out = references["search"]
        assert isinstance(held_out, Reference)  # others were refused
        refinery = Refinery(original, architecture_of(original), quantizer, calibration=calibration, held_out=held_out, settings=settings)
        matrices = stored_matrices(family.variants(chosen.config), family.space, chosen.config, targets.get(family.target), family.source)
        data = refinery.refine(stored, matrices, progress).data
    point = refined(replace(chosen, search=before), {name: reference.measured(stored) for name, reference in references.items()})
    assert point.search is not None
    if not point.refined:
        return Refined(chosen, before, before)
    _keep(family, point, data)
    return Refined(point, before, point.search)


def _require_trainable(family: Family, chosen: Point) -> None:
    """Raises `UserError` where there is nothing to train of what a budget chooses."""
    dense, recipe = CutTarget.of(targets.get(family.target)).dense(family.source), family.manifest.recipe
    if recipes.get(recipe).recovery is None:
        raise UserError(f"{recipe}, by which {family.path} was pruned, doesn't train.", remedy="Fit with --recipe ziplm.")
    if others := sorted(set(chosen.config.formats.values()) - {dense}):
        raise UserError(
            f"The best of {family.path} within this budget has matrices in {', '.join(others)}, and what is pruned is trained in {dense}.",
            remedy="Refine a family that was fitted without these formats.",
        )
    if chosen.config == family.space.largest():
        raise UserError("The best within this budget is the original itself.", remedy="Give less.")


def _require_memory(family: Family, where: torch.device, memory: str | None) -> None:
    """Raises `UserError` where that takes more memory than a run may use."""
    networks = 1 + recovery.NETWORKS if family.pruned else 2 + refining.NETWORKS
    needed = 4 * networks * family.original.num_parameters
    limit = devices.usable(where, memory_limit(memory))
    if limit is not None and needed > limit:
        on_device = where.type != "cpu"
        kind = "the graphics processor's memory" if on_device else "memory"
        remedy = f"Say --memory {math.ceil(needed / 10**7) / 100:.2f}GB where there is as much"
        raise UserError(
            f"Refining {family.original.name} takes {describe(BYTES, needed)} of {kind}, {networks} times the network in float32, and "
            f"{describe(BYTES, limit)} may be used.",
            remedy=f"{remedy}, or --device cpu." if on_device else f"{remedy}.",
        )


def _trained(family: Family, chosen: Point, model: PreTrainedModel, original: PreTrainedModel, progress: Progress) -> dict[str, Tensor]:
    """The tensors of the cut `model`, which is trained and left as they say, in the family's type."""
    how = recipes.get(family.manifest.recipe).recovery
    assert how is not None
    training = Recovery(original, family.text()["calibration"], how, how.settings, progress)
    with tempfile.TemporaryDirectory() as folder:
        training.run(model, chosen.config, chosen.bits, store=Store(Path(folder)), checkpoint="checkpoint.safetensors")
    return settled(model, DTYPES[CutTarget.of(targets.get(family.target)).dense(family.source)])


def _original(family: Family, model: str | Path | None) -> Checkpoint:
    place = model if model is not None else MODEL if family.original.embedded else family.original.name
    try:
        checkpoint = Checkpoint.open(place, trust_remote_code=family.source.trust_remote_code)
    except ModelError as error:
        if model is not None:
            raise
        raise ModelError(f"The original of {family.path} isn't at hand: {error.problem}", remedy="Name it with --model.") from error
    if checkpoint.digest != family.original.digest:
        raise ModelError(
            f"{checkpoint.name} isn't the network that {family.path} was made of: its content differs.",
            remedy="Name that very network with --model."
            if model is None
            else "Name the folder or hub id that the family was fitted from.",
        )
    return checkpoint


def _keep(family: Family, point: Point, data: dict[str, Tensor]) -> None:
    """Write the matrices, then the manifest that names them: killed in between, the family is as it was.

    What was refined since the family was opened, by another process too, stays.
    """
    with locked(family.path):
        _add(family, point, data)


def _add(family: Family, point: Point, data: dict[str, Tensor]) -> None:
    made_of = family.provenance
    family.reload()
    if family.provenance != made_of:
        raise FamilyError(f"{family.path} has become another family meanwhile.", remedy="Refine it again.")
    name = refined_file(point.config)
    (family.path / REFINED).mkdir(exist_ok=True)
    Store(family.path).write_tensors(name, data)
    others = [other for other in family.manifest.points if other.config != point.config]
    files = {**family.manifest.files, name: sha256(family.path / name)}
    manifest = with_points(family.manifest, [*others, point], files)
    write_json(family.path / NAME, manifest.to_json())
    family.reload()
    write_page(family, family.path / "report.html")
