"""A family: the folder from which the best model for any budget is taken in seconds."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from transformers import PreTrainedModel

from anyfit import network
from anyfit.activations import round_inputs
from anyfit.architectures import architecture_of
from anyfit.checkpoint import Source, read_config
from anyfit.core.budget import LATENCY, Budget
from anyfit.core.config import HEADS, SPARSITY, WIDTH, Config, format_of
from anyfit.core.errors import FamilyError, OutputError, RuntimeMissingError
from anyfit.core.files import output_error, refuse_existing, written_aside
from anyfit.core.space import Space
from anyfit.costs.latency import Device
from anyfit.elastic.extracted import Extracted
from anyfit.family.manifest import NAME, TIMED_ON, Manifest, Original, Point
from anyfit.family.store import PASSTHROUGH, SOURCE, TEXT, Decoder, Store, refined_file
from anyfit.progress import Progress, Silent
from anyfit.report.card import model_card
from anyfit.searchers.exact import Solver
from anyfit.structure.cutting import cut, rows_of
from anyfit.structure.levels import Structure, kept_of
from anyfit.structure.masks import mask_of, plain
from anyfit.structure.space import kept_of_blocks, kept_structures, structures
from anyfit.targets import targets
from anyfit.targets.base import ALL, Check, Cut, CutTarget, Target, Variants
from anyfit.targets.transformers import write_cut, write_dense


@dataclass(frozen=True)
class Export:
    """A model that was written: where, how large, what it is, and what was checked."""

    path: Path
    bytes_: int
    bits: float
    budget: str
    point: Point
    checks: tuple[Check, ...]
    seconds: float
    notes: tuple[str, ...] = ()
    """What is to be known of the budget, see `Family.notes_on`."""

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "bytes": self.bytes_,
            "bits": self.bits,
            "budget": self.budget,
            "config": self.point.config.to_json(),
            "predicted_kl": self.point.predicted,
            "report": self.point.report and self.point.report.to_json(),
            "checks": [vars(check) for check in self.checks],
            "seconds": self.seconds,
            "notes": list(self.notes),
        }


class Family:
    """Opened by `Family.open(path)`. Nothing but the manifest is read until it is needed.

    >>> family = Family.open("smol.family")                 # doctest: +SKIP
    >>> family.export("1.5GB", "smol.gguf")                 # doctest: +SKIP
    """

    def __init__(self, path: Path, manifest: Manifest, *, trust_remote_code: bool = False) -> None:
        self.path = path
        self.manifest = manifest
        self.trust_remote_code = trust_remote_code
        self._store = Store(path, manifest.files)

    @classmethod
    def open(cls, path: str | Path, *, trust_remote_code: bool = False) -> Family:
        """Raises `FamilyError` where the folder is no family, is altered, or comes from a newer version.

        `trust_remote_code`: of an original that came with its own Python code, run what the family has of it, without which no model can be
        taken out.
        """
        path = Path(path)
        return cls(path, Manifest.read(path), trust_remote_code=trust_remote_code)

    def reload(self) -> None:
        """See what has been written to the folder since it was opened."""
        path, manifest, trusted = self.path, Manifest.read(self.path), self.trust_remote_code
        vars(self).clear()
        Family.__init__(self, path, manifest, trust_remote_code=trusted)

    @property
    def name(self) -> str:
        return self.path.name.removesuffix(".family")

    @property
    def target(self) -> str:
        return self.manifest.target

    @property
    def space(self) -> Space:
        return self.manifest.space

    @property
    def original(self) -> Original:
        return self.manifest.original

    @property
    def coverage(self) -> tuple[tuple[str, str, str], ...]:
        """(unit or parameter, format, reason) for everything that was not treated as asked."""
        return self.manifest.coverage

    @property
    def notes(self) -> tuple[str, ...]:
        return self.manifest.notes

    @property
    def provenance(self) -> Mapping[str, Any]:
        return self.manifest.provenance

    @property
    def digest(self) -> str:
        """Content hash of the whole family: equal for equal model, data, settings and version."""
        return self.manifest.digest

    @property
    def points(self) -> tuple[Point, ...]:
        """Every config that was measured, uniform settings included, smallest first."""
        return tuple(sorted(self.manifest.points, key=lambda p: (self.size(p), p.config.digest)))

    @cached_property
    def frontier(self) -> tuple[Point, ...]:
        """The measured configs than which none is both smaller and closer to the original."""
        best, kept = float("inf"), []
        for point in sorted(self.points, key=lambda p: (self.size(p), _measured(p))):
            if _measured(point) < best:
                best = _measured(point)
                kept.append(point)
        return tuple(kept)

    def size(self, point: Point) -> float:
        """A config's leading cost: bytes, or milliseconds where latency was measured."""
        return self.space.costs(point.config)[self.space.scale]

    def budget(self, text: str | Iterable[str] | Budget) -> Budget:
        """Read a budget, or the name of one choice everywhere; percentages are of the original's weight files, or of what else the whole
        network costs."""
        if isinstance(text, Budget):
            return text
        (setting, *more) = [text] if isinstance(text, str) else list(text) or [""]
        if not more and setting in self.space.uniforms():
            return Budget((), setting, setting)
        return Budget.parse(text, original=self.space.original(self.original.bytes_))

    def notes_on(self, budget: str | Iterable[str] | Budget) -> tuple[str, ...]:
        """What is to be known of a budget: whose milliseconds it counts, where these were measured on another device than this."""
        if TIMED_ON not in self.provenance or LATENCY not in dict(self.budget(budget).limits):
            return ()
        timed_on = Device(**self.provenance[TIMED_ON])
        runtime = timed_on.runtime
        with suppress(RuntimeMissingError):  # a family may be chosen from where its runtime isn't
            if watch := targets.get(self.target).stopwatch():
                runtime = watch.runtime
        differences = timed_on.differences(Device.here(runtime, timed_on.threads))
        return (f"The budget's milliseconds are those of {timed_on}, not of this device: {differences}.",) if differences else ()

    def select(self, budget: str | Iterable[str] | Budget) -> Point:
        """The best config within the budget.

        It is the exact optimum of the additive scores, unless a config that was measured within the budget is
        expected to be better: uniform settings, the finalists of the fit and refined configs always compete. Raises
        `BudgetError` where nothing fits.
        """
        return self._best(budget, _measured)

    def select_unrefined(self, budget: str | Iterable[str] | Budget) -> Point:
        """The best config within the budget as if none had been refined: the one to refine."""
        return self._best(budget, lambda point: point.plain_loss)

    def _best(self, budget: str | Iterable[str] | Budget, measured: Callable[[Point], float]) -> Point:
        budget = self.budget(budget)
        if budget.setting is not None:
            return self.point(self.space.uniform(budget.setting))
        found = self.point(self._solver.solve(budget))
        rivals = [p for p in self.points if budget.allows(self.space.costs(p.config))]
        best = min(rivals, key=measured, default=None)
        if best is None or found in rivals:
            return found if best is None or measured(found) <= measured(best) else best
        return best if measured(best) <= self.expected(found.predicted) else found

    def point(self, config: Config) -> Point:
        """What is known of a config: its measured point, or its costs and prediction."""
        for point in self.manifest.points:
            if point.config == config:
                return point
        predicted = self.manifest.table.predict(self.space, config)
        return Point(config, self.space.bytes_(config), self.space.bits(config), predicted)

    def expected(self, predicted: float) -> float:
        """The loss that configs with this predicted one were measured to have, interpolated."""
        return float(np.exp(np.interp(np.log(max(predicted, 1e-12)), *self._calibrated)))

    @cached_property
    def _calibrated(self) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of predicted and of measured losses, both rising."""
        rows = sorted((max(p.predicted, 1e-12), max(p.plain_loss, 1e-12)) for p in self.points)
        x, y = np.log(np.array(rows)).T
        return x, isotonic_regression(y).x

    @cached_property
    def _solver(self) -> Solver:
        return Solver(self.space, self.manifest.table)

    @cached_property
    def source(self) -> Source:
        """What is needed of the original to write any model; every file checked against its hash. Raises `FamilyError` where code is among
        that, and whoever opened the family doesn't trust it."""
        folder = self.path / SOURCE
        expected = {name for name in self.manifest.files if name.startswith(f"{SOURCE}/")}
        code = sorted(name for name in expected if name.endswith(".py"))
        if code and not self.trust_remote_code:
            raise FamilyError(
                f"{self.path / code[0]} is Python code of the original, which this would run.",
                remedy="If you trust who made the family, pass trust_remote_code=True (--trust-remote-code).",
            )
        for name in expected:
            self._store.verify(name)
        added = sorted({f"{SOURCE}/{path.name}" for path in folder.iterdir()} - expected)
        if added:
            raise FamilyError(f"{self.path / added[0]} was added to the family.", remedy="Move it away.")
        trusted = self.trust_remote_code and self.manifest.trust_remote_code
        return Source(
            folder=folder,
            config=read_config(folder, trust_remote_code=trusted),
            passthrough=self._store.tensors(PASSTHROUGH),
            tied=dict(self.manifest.tied),
            original_bytes=self.original.bytes_,
            trust_remote_code=trusted,
        )

    def text(self) -> dict[str, torch.Tensor]:
        """What was calibrated with and measured on: `calibration`, `search`, `report`, int64 (segments, length), or pictures."""
        found = self._store.tensors(TEXT)
        return {name: own if own.is_floating_point() else own.long() for name, own in found.items()}

    def extract(self, budget: str | Iterable[str] | Budget | Config) -> PreTrainedModel:
        """An ordinary transformers model in float32, with the very values that an exported file holds. Modules whose inputs the file rounds
        to 8 bits round them by a hook (`anyfit.activations`), which saving the model loses."""
        config = budget if isinstance(budget, Config) else self.select(budget).config
        if self.pruned and self.point(config).refined:
            return self._recovered(config)
        decoder = self._decoder(config)
        model = self.source.build(decoder.matrices(self.space, config))
        model = self._cut(model, self._kept(config)) if self.pruned else model
        for decision in self.space.decisions:
            for weight in decision.unit.weights:
                if rounding := decoder.left_inputs(weight, config[decision.key]):
                    round_inputs(model.get_submodule(weight.name.rpartition(".")[0]), rounding)
        return model

    def _recovered(self, config: Config) -> PreTrainedModel:
        """A network that was cut and trained: all of its numbers are its own, and so is which structures are left, so that sizes are
        all there is to know of them."""
        kept = kept_structures(self._structures, config, lambda name: torch.arange(self._structures[name].num))
        return network.fill(self._cut(self.source.frame(), kept), self.source.folder, self._store.tensors(refined_file(config)))

    def _cut(self, model: PreTrainedModel, kept: Mapping[str, torch.Tensor]) -> PreTrainedModel:
        architecture = architecture_of(model)
        return cut(model, architecture, kept_of_blocks(self._structures, kept, architecture.num_blocks(model)))

    @cached_property
    def _structures(self) -> dict[str, Structure]:
        model = self.source.skeleton()
        return structures(model, architecture_of(model), {w.name: w for d in self.space.decisions for w in d.unit.weights}.values())

    def _kept(self, config: Config) -> dict[str, torch.Tensor]:
        """The structures that a config keeps, by the name of the matrix that reads them."""
        return kept_structures(self._structures, config, self._store.order)

    def cut(self, config: Config) -> Cut:
        """What is written of a config from which parts are left out."""
        target = CutTarget.of(targets.get(self.target))
        model, dense = self.extract(config), target.dense(self.source)
        architecture, whole = architecture_of(model), self.source.skeleton()
        kept, rows = self._kept(config), dict[str, torch.Tensor]()
        formats, readers = dict[str, str](), dict[str, str]()
        for decision in self.space.decisions:
            choice = config[decision.key]
            if format_of(choice) == dense or kept_of(choice) == 0:
                continue
            formats |= {weight.name: format_of(choice) for weight in decision.unit.weights}
            if structure := self._structures.get(decision.unit.name):
                readers[structure.reader.name] = choice
                own = rows_of(whole, architecture, structure.reader, kept[structure.reader.name])
                rows |= {w.name: target.places(self.source, w, own[w.name]) for w in structure.rest if w.name in own}

        def variant(weight: str, format_: str, which: torch.Tensor | slice = ALL) -> torch.Tensor:
            left = self._store.variant(weight, readers.get(weight, format_), rows.get(weight, ALL))
            return left[which]

        return Cut(model, formats, variant)

    @property
    def pruned(self) -> bool:
        """Whether its sizes differ in heads and channels, not in formats alone."""
        return any(decision.axis in (HEADS, WIDTH) for decision in self.space.decisions)

    @property
    def masked(self) -> bool:
        """Whether its members differ in which weights are zero."""
        return any(decision.axis == SPARSITY for decision in self.space.decisions)

    def variants(self, config: Config) -> Variants:
        """The bytes of each matrix under a config: its own ones where it was refined."""
        return self._store.refined(config) if self.point(config).refined else self._store.variant

    def _as_written(self, config: Config) -> tuple[Space, Config, Variants]:
        """A config as targets know it: of formats alone, the masks in the bytes."""
        variants = self.variants(config)
        if not self.masked:
            return self.space, config, variants
        chosen = config.chosen
        return *plain(self.space, config), lambda weight, _, which=ALL: variants(weight, chosen[weight], which)

    def _decoder(self, config: Config) -> Decoder:
        return Decoder(self.variants(config), targets.get(self.target), self.source)

    def export(
        self,
        budget: str | Iterable[str] | Budget,
        path: str | Path,
        *,
        force: bool = False,
        check: bool = True,
        progress: Progress | None = None,
    ) -> Export:
        """Write the best model within `budget` for the family's target, audit it, and load it back.

        Raises `BudgetError` for a budget that can't be met, `OutputError` where `path` exists (unless `force`)
        or can't be written, or where the written file doesn't pass its checks; then nothing is left at `path`.
        """
        path, progress, began = Path(path), progress or Silent(), time.perf_counter()
        target = targets.get(self.target)
        card = path.with_suffix(".README.md") if target.suffix else None
        self._refuse(path, force=force, folder=card is None)
        if card is not None:
            self._refuse(card, force=force, folder=False)
        budget = self.budget(budget)
        point = self.select(budget)
        with written_aside(path, force=force) as aside:
            with progress.stage("write", 1) as stage:
                made = self.cut(point.config) if self.pruned else None
                if made is None:
                    size = target.write(aside, self.source, *self._as_written(point.config))
                    assert size == point.bytes_, f"predicted {point.bytes_} bytes, wrote {size}"
                else:
                    size = CutTarget.of(target).write_cut(aside, self.source, made)
                    assert size <= point.bytes_, f"predicted at most {point.bytes_} bytes, wrote {size}"
                stage.advance()
            assert budget.allows(self.space.costs(point.config)), (size, budget)
            checks = self._check(target, aside, point, made, progress) if check else ()
            with written_aside(card or aside / "README.md", force=force) as page:
                page.write_text(model_card(self, point, path.name), encoding="utf-8")
        return Export(path, size, point.bits, str(budget), point, checks, time.perf_counter() - began, self.notes_on(budget))

    def save(self, budget: str | Iterable[str] | Budget, path: str | Path, *, force: bool = False) -> Point:
        """Write the best model within `budget` as an ordinary transformers folder, its weights decoded to float32.

        The budget is that of the family's target; the folder is larger. For looking, measuring and training on.
        """
        path = Path(path)
        self._refuse(path, force=force, folder=True)
        point = self.select(budget)
        with written_aside(path, force=force) as aside:
            if self.pruned:
                write_cut(aside, self.source, self.extract(point.config))
            else:
                write_dense(aside, self.source, self._decoder(point.config).matrices(self.space, point.config))
            (aside / "README.md").write_text(model_card(self, point, path.name, dense=True), encoding="utf-8")
        return point

    def _refuse(self, path: Path, *, force: bool, folder: bool) -> None:
        if self.path.resolve() in path.resolve().parents:
            raise OutputError(f"{path} is inside the family {self.path}.", remedy="Name another output.")
        refuse_existing(path, force=force, ours=_is_model_of_ours if folder else Path.is_file, inputs=[self.path])

    def _check(self, target: Target, path: Path, point: Point, cut: Cut | None, progress: Progress) -> tuple[Check, ...]:
        """Of what was written of a config, or of this network, from which parts were left out."""
        with progress.stage("check", 1) as stage:
            tokens = self.text()["search"][:2]
            with tempfile.TemporaryDirectory() as folder:
                try:
                    if cut is not None:
                        checks = CutTarget.of(target).check_cut(path, self.source, cut, tokens)
                    else:
                        extracted = Extracted(self.source, point.config, self._decoder(point.config), Path(folder))
                        checks = target.check(path, self.source, self._as_written(point.config)[1], extracted, tokens)
                        checks += self._check_masks(point.config, extracted)
                except OSError as error:  # what reads the file makes findings of its errors; this is about our own files
                    raise output_error(error, Path(folder)) from error
            stage.advance()
        failed = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
        if failed:
            raise OutputError(
                f"The written file isn't what it should be ({'; '.join(failed)}).",
                remedy="Nothing was kept. Please report this with the model's name.",
            )
        return checks

    def _check_masks(self, config: Config, extracted: Extracted) -> tuple[Check, ...]:
        """Of the network that the file was compared with; nothing where nothing is masked."""
        chosen = {d.unit.weights[0]: mask for d in self.space.decisions if (mask := mask_of(config[d.key]))}
        if not chosen:
            return ()
        others = []
        for weight, mask in chosen.items():
            matrix = extracted.parameter(weight.name)
            if not mask.holds(matrix.T if weight.transposed else matrix):
                others.append(weight.name)
        detail = f"{others[0]} has other zeros than its mask" if others else f"{len(chosen)} matrices have the zeros of their masks"
        return (Check("masks", not others, detail),)


def is_family(path: Path) -> bool:
    """Whether a folder is a family, as far as its manifest's presence tells."""
    return (path / NAME).is_file()


def _is_model_of_ours(path: Path) -> bool:
    """Whether a folder is a model that was written here: its card says so."""
    card = path / "README.md"
    return (path / "config.json").is_file() and card.is_file() and "anyfit" in card.read_text(encoding="utf-8", errors="ignore")


def _measured(point: Point) -> float:
    assert point.search is not None, "only measured configs compete"
    return point.search.loss


def with_points(manifest: Manifest, points: Iterable[Point], files: Mapping[str, str]) -> Manifest:
    """The manifest with these points and files in place of its own."""
    return replace(manifest, points=tuple(points), files=dict(files))
