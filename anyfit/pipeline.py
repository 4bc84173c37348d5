"""From a network to a family: the stages of `fit`, each of which may be killed and is then continued."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from anyfit import closing
from anyfit.architectures import architecture_of
from anyfit.architectures.base import Architecture
from anyfit.architectures.coverage import uncovered
from anyfit.calibration.data import Segments
from anyfit.checkpoint import Checkpoint, Source
from anyfit.core.effort import Effort
from anyfit.core.errors import UserError
from anyfit.core.files import output_error, remove
from anyfit.core.space import Decision, Space, coverage
from anyfit.core.units import Weight
from anyfit.costs.latency import LatencyTable
from anyfit.costs.parts import measured
from anyfit.devices import CPU, device, moved
from anyfit.distributed import ALONE, Group
from anyfit.elastic.loaded import loaded
from anyfit.elastic.model import ElasticModel
from anyfit.elastic.stream import ElasticStream
from anyfit.encoding import FOLDER as CALIBRATION
from anyfit.encoding import CalibrationPass, Encoding
from anyfit.family.journal import Journal
from anyfit.family.manifest import TIMED_ON, Manifest, Original, Point
from anyfit.family.store import Decoder, Store, stored_matrices
from anyfit.finalists import EXACT, WORK, Finalists
from anyfit.formats.nested import held
from anyfit.importance import importances, saliencies
from anyfit.importance.base import Importance, NetworkImportance
from anyfit.importance.sparsity import pooled
from anyfit.interface import LANGUAGE, interface_of
from anyfit.masking import Masking
from anyfit.progress import Progress
from anyfit.quantizers import quantizers
from anyfit.quantizers.base import Quantizer
from anyfit.recipes import recipes
from anyfit.recipes.base import Nesting as NestingRecipe
from anyfit.recipes.base import Training as TrainingRecipe
from anyfit.recipes.base import Tuning as TuningRecipe
from anyfit.scores import fisher, sensitivities
from anyfit.scores.table import Table
from anyfit.streaming import Stream
from anyfit.structure.levels import Structure
from anyfit.structure.masks import Mask, menu
from anyfit.structure.masks import space as masked_space
from anyfit.structure.space import Pruning, structures
from anyfit.structuring import Structuring
from anyfit.structuring import table as structured_table
from anyfit.targets import targets
from anyfit.targets.base import CutTarget
from anyfit.tasks.language import Reference
from anyfit.trainers import samplers
from anyfit.trainers.losses import ORIGINAL, TOWARDS
from anyfit.training import FOLDER as TRAINING
from anyfit.training import RESULT, Changes, Nesting, Training, Tuning, decided, gains
from anyfit.tuning.refining import Refinery

NUM_PROBE_SEGMENTS = 8
"""Search segments that sensitivities are measured on, of a language model."""
TABLE, SCORED, GRADUAL = "table.json", "scored.safetensors", "gradual"
"""In the journal: the additive table, what each structure costs by an importance that looks at the whole network, and the folder of
`anyfit.gradual`."""
STATES = "states"
"""The journal's folder of hidden states; what a killed run left there is of no use."""
WHILE_IT_RUNS = (TABLE, SCORED, STATES, CALIBRATION, TRAINING, RESULT, GRADUAL, *WORK)
"""What the journal holds for a run that is continued, and no family has."""


@dataclass(frozen=True)
class Settings:
    """Everything that decides what a family holds, besides the model and the text."""

    target: str
    formats: tuple[str, ...]
    recipe: str
    length: int
    num_calibration: int
    num_search: int
    num_report: int
    seed: int
    effort: Effort = Effort.NORMAL
    search: str = EXACT
    device: str = "cpu"
    latency: str | None = None
    """Digest of the table that latencies are taken from."""
    recover: tuple[str, ...] = ()
    """Budgets, falling, for which a network is cut and trained, each from the one before."""
    towards: str = ORIGINAL
    """What a recipe that trains does so towards, see `trainers.losses.TOWARDS`."""
    patience: int | None = None
    """Of its training, see `trainers.loop.Settings`."""
    importance: str | None = None
    """By what a recipe that prunes does so, instead of its own."""


class Fit:
    """One run. Stages write into the journal's folder and skip what they find there."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        segments: Segments,
        settings: Settings,
        progress: Progress,
        group: Group = ALONE,
        latency: LatencyTable | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.latency = latency
        self.segments = segments
        self.settings = settings
        self.progress = progress
        self.group = group
        self.target = targets.get(settings.target)
        recipe = recipes.get(settings.recipe)
        self.recipe = recipe if settings.importance is None else replace(recipe, pruning=settings.importance)
        self.effort = settings.effort
        self.device = device(settings.device)
        self._stream: Stream | None = None
        self._scored: dict[str, Tensor] = {}

    @property
    def key(self) -> dict[str, Any]:
        """What the journal compares before it continues a run."""
        return {
            "anyfit": version("anyfit"),
            "model": self.checkpoint.digest,
            "data": self.segments.digest,
            "versions": versions(),
            **{name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self.settings).items()},
        }

    @cached_property
    def model(self) -> PreTrainedModel:
        """The original, in float32, on the device. Stages that change it put it back."""
        return moved(self.checkpoint.load(), self.device)

    @cached_property
    def architecture(self) -> Architecture:
        return architecture_of(self.checkpoint.skeleton())

    @cached_property
    def weights(self) -> list[Weight]:
        return list(self.architecture.weights(self.checkpoint.skeleton()))

    @cached_property
    def structures(self) -> dict[str, Structure]:
        """What a recipe that prunes makes smaller, by the name of the matrix that reads it; empty where formats are decided."""
        if self.recipe.pruning is None:
            return {}
        return structures(self.checkpoint.skeleton(), self.architecture, self.weights)

    @cached_property
    def source(self) -> Source:
        """What is left of the original when what is decided is taken away."""
        return self.checkpoint.source([weight for weight in self.weights if not self._keeps(weight)])

    def _keeps(self, weight: Weight) -> bool:
        """Whether a matrix stays as it is: outside the blocks of a network of which nothing is to be quantised."""
        return bool(self.structures) and weight.block is None and not self.settings.formats

    @cached_property
    def kept_weights(self) -> dict[Mask, dict[str, int]]:
        """{mask: {matrix: weights that it keeps}} of masks that are of the whole network together. Reads all of its matrices."""
        shares = [mask for mask in menu(self.recipe.masks) if mask.group is None and saliencies.get(mask.score).pooled]
        return pooled(((w.name, self.checkpoint.read(w.name)) for w in self.weights if w.block is not None), shares)

    @cached_property
    def space(self) -> Space:
        if not self.structures:
            dense = self.target.space(self.source, self.weights, self.settings.formats)
            return masked_space(dense, self.recipe.masks, self.kept_weights) if self.recipe.masks else dense
        storage = CutTarget.of(self.target).storage(self.source, self.settings.formats)
        formats = list(dict.fromkeys([storage.dense, *self.settings.formats]))
        found = Pruning(
            self.source,
            self.architecture,
            self.structures,
            self.weights,
            formats,
            bool(self.settings.formats),
            self.settings.length,
            interface_of(self.checkpoint.config) is LANGUAGE,
            None if self.latency is None else measured(self.latency, formats),
        )
        return found.space(storage)

    def stream(self, store: Store) -> Stream:
        """The network as it runs block by block, its states in the store's folder."""
        if self._stream is None:
            self._stream = self.streamed(store.folder / STATES / str(self.group.rank))
        return self._stream

    def streamed(self, folder: Path) -> Stream:
        """The network as it runs block by block, its states in this folder."""
        return Stream(self.checkpoint, self.architecture, folder, device=self.device)

    def elastic(self, store: Store) -> ElasticStream:
        """The network as any config, block by block."""
        return ElasticStream(self.stream(store), self.space, Decoder(store.variant, self.target, self.source), self.group)

    def elastic_model(self, store: Store) -> ElasticModel:
        """A second copy of the network in memory, which runs as any config; the first stays the original."""
        network = moved(self.checkpoint.load(), self.device)
        return ElasticModel(network, self.space, Decoder(store.variant, self.target, self.source))

    def run(self, output: Path, *, restart: bool, force: bool) -> None:
        """Make the family at `output`. Raises `UserError`s only; what is finished is kept for the next run."""
        with self._journal(output, restart=restart, force=force) as journal:
            store = Store(journal.folder)
            try:
                self.encode(store)
                self.train(store)
                table = self.score(store)
                original, points = self.finalists(store, table)
                if self.group.first:
                    closing.keep_source(store, self.checkpoint, self.source, self.segments)
                    closing.close(journal, self.manifest(store, table, original, points), WHILE_IT_RUNS)
            except OSError as error:
                raise output_error(error, output) from error
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"The graphics processor's memory is full: {str(error).splitlines()[0]}",
                    remedy="Close what else uses it, or say --device cpu. What is finished is kept only for the same device.",
                ) from error
            finally:
                self._stream = None
        self.group.wait()

    @contextmanager
    def _journal(self, output: Path, *, restart: bool, force: bool) -> Iterator[Journal]:
        """The first process opens the journal, the others join when it has."""
        if not self.group.first:
            self.group.wait()
            yield Journal.joined(output)
            return
        with Journal.open(output, self.key, restart=restart, force=force) as journal:
            remove(journal.folder / STATES)
            self.group.wait()
            yield journal

    def encode(self, store: Store) -> None:
        """Every variant of every matrix. One factorisation per distinct input, shared by all its matrices."""
        self.scored(store)
        self.calibration_pass(store, self.stream(store), self.segments.calibration).run()

    def calibration_pass(self, store: Store, stream: Stream, tokens: Tensor) -> CalibrationPass:
        """What makes the variants of this run's space with these tokens, (segments, length)."""
        shared = (stream, self.space, store, tokens, self.progress, self.group, self.target, self.source, self.quantizer, self.nested)
        if self.recipe.pruning is not None:
            return Structuring(*shared, self.structures, lambda name: self._importance(store, name))
        return Masking(*shared, self.kept_weights) if self.recipe.masks else Encoding(*shared)

    @cached_property
    def nested(self) -> frozenset[str]:
        """Matrices of whose integers the finest are stored alone as soon as they are encoded: those outside the blocks, where a recipe
        trains the others to be nested."""
        nests = isinstance(self.recipe.training, NestingRecipe)
        return frozenset(weight.name for weight in self.weights if nests and weight.block is None)

    def _importance(self, store: Store, matrix: str) -> Importance:
        """Of the structures that a matrix reads."""
        found = importances.get(self.recipe.pruning or "")
        return found.of(self.scored(store)[matrix]) if isinstance(found, NetworkImportance) else found

    def scored(self, store: Store) -> dict[str, Tensor]:
        """What each structure costs, by the matrix that reads it, where the importance looks at the whole network; else nothing."""
        found = importances.get(self.recipe.pruning or "") if self.recipe.pruning else None
        if not isinstance(found, NetworkImportance):
            return {}
        if not self._scored:
            if self.group.first and not (store.folder / SCORED).exists():
                made = found.scores(self.model, self.architecture, self.structures, self.segments.calibration, self.progress)
                store.write_tensors(SCORED, made)
            self.group.wait()
            self._scored = store.tensors(SCORED)
        return self._scored

    @property
    def quantizer(self) -> Quantizer:
        return quantizers.get(self.recipe.quantizer)

    def train(self, store: Store) -> None:
        """Variants made better by gradients, where the recipe does that."""
        if self.recipe.training is None:
            return
        if self.group.told(gains(store)) is None:
            self._changes(store).run()
        if self.group.first:
            remove(store.folder / TRAINING)
        self.group.wait()

    def _changes(self, store: Store) -> Changes:
        how = self.recipe.training
        assert how is not None
        decisions = decided(self.space, how)
        original, largest = self._networks(store, decisions)
        shared: dict[str, Any] = {
            "store": store,
            "space": self.space,
            "decisions": decisions,
            "original": original,
            "largest": largest,
            "matrices": lambda config: stored_matrices(store.variant, self.space, config, self.target, self.source),
            "text": self.segments.calibration,
            "held_out": self.segments.search,
            "progress": self.progress,
            "group": self.group,
            "settings": replace(how.settings_for(self.effort), patience=self.settings.patience),
        }
        if isinstance(how, TuningRecipe):
            return Tuning(**shared)
        shared |= {
            "towards": TOWARDS[self.settings.towards],
            "sampler": samplers.get(how.sampler),
            "expected": cache(lambda: self.expected(store, decisions)),
        }
        if isinstance(how, NestingRecipe):
            return Nesting(**shared, scale_rate=how.scale_rate, shares=how.shares)
        return Training(**shared, sharded=self.shards, relative=how.relative and self.settings.towards == ORIGINAL)

    def expected(self, store: Store, decisions: Sequence[Decision]) -> Table:
        """What these decisions' choices lose as they were encoded, from one backward pass: for training, which comes before the score."""
        tokens, errors = self.segments.search[:NUM_PROBE_SEGMENTS], self.errors(store)
        information = fisher.information(self.elastic(store), decisions, tokens, self.progress)
        return Table(information, {name: errors[name] for name in information})

    def _networks(self, store: Store, decisions: Iterable[Decision]) -> tuple[PreTrainedModel, Callable[[], PreTrainedModel]]:
        """The original, and what makes the network in its largest choices: where processes share it, without the matrices to train."""
        if not self.shards:
            return self.model, lambda: self.elastic_model(store).set(self.space.largest())
        self.__dict__.pop("model", None)  # whole, where it has written text
        elastic, trained = self.elastic(store), {weight.name for decision in decisions for weight in decision.unit.weights}
        load = partial(loaded, self.checkpoint, self.architecture)
        return load(elastic.original, self.group), lambda: load(elastic.numbers(self.space.largest()), ALONE, trained)

    @property
    def shards(self) -> bool:
        """Whether several processes hold the networks of training together, each a part."""
        return isinstance(self.recipe.training, TrainingRecipe) and not self.group.alone and self.device == CPU

    def score(self, store: Store) -> Table:
        """The additive table: measured sensitivities times each choice's own output error."""
        path = store.folder / TABLE
        if self.group.told(path.exists()):
            return Table.load(path)
        tokens, sensitivity = self.segments.search[: num_probed(self.checkpoint.config)], sensitivities.get(self.recipe.score)
        if self.structures:
            dense = CutTarget.of(self.target).dense(self.source)
            table = structured_table(
                self.elastic(store), store, self.structures, dense, sensitivity, tokens, self.scored(store), self.progress
            )
        else:
            errors = self.errors(store)
            table = Table(sensitivity.measure(self.elastic(store), tokens, errors, self.progress), errors)
        if self.group.first:
            table.save(path)
        return table

    def errors(self, store: Store) -> dict[str, dict[str, float]]:
        """{unit: {choice: expected squared error of its outputs}}; of what was trained, as much less as the loss is."""
        found = {}
        for decision in self.space.decisions:
            rows = [store.errors(weight.name) for weight in decision.unit.weights]
            found[decision.unit.name] = {c.name: sum(row[c.name] for row in rows) for c in decision.choices}
        if self.recipe.training is not None and (gained := gains(store)) is not None:
            for decision in decided(self.space, self.recipe.training):
                for choice in decision.choices:
                    if choice.name in gained:
                        found[decision.unit.name][choice.name] *= gained[choice.name].factor
        return found

    def finalists(self, store: Store, table: Table) -> tuple[Original, list[Point]]:
        """Optima along the frontier and every uniform setting, measured on both held-out splits; with more effort, refined."""
        texts = {name: getattr(self.segments, name) for name in ("search", "report")}
        finalists = Finalists(
            store,
            table,
            self.elastic(store),
            lambda: self.elastic_model(store),
            texts,
            self.segments.calibration,
            self.effort,
            self.settings.search,
            self.progress,
        )
        points, references = self.improved(finalists, finalists.points()), finalists.references
        original = Original(
            name=self.checkpoint.name,
            bytes_=self.checkpoint.bytes_,
            num_parameters=self.space.num_parameters,
            dtype=str(self.checkpoint.dtype).removeprefix("torch."),
            digest=self.checkpoint.digest,
            embedded=self.checkpoint.embedded,
            search=references["search"].quality,
            report=references["report"].quality,
        )
        return original, points

    def improved(self, finalists: Finalists, points: list[Point]) -> list[Point]:
        """The points, some of them with matrices of their own."""
        if not self.effort.refines or not self.group.first or self.structures or self.recipe.masks:
            return points
        held_out = finalists.references["search"]
        assert isinstance(held_out, Reference)  # api.prepare refuses others
        store, refinery = finalists.store, self._refinery(held_out)
        return finalists.refined(points, refinery, lambda c: stored_matrices(store.variant, self.space, c, self.target, self.source))

    def _refinery(self, held_out: Reference) -> Refinery:
        return Refinery(self.model, self.architecture, self.quantizer, calibration=self.segments.calibration, held_out=held_out)

    def coverage(self) -> tuple[tuple[str, str, str], ...]:
        """(unit or tensor, format, reason) for everything that is not treated as asked."""
        kept = [(name, "", reason) for name, reason in uncovered(self.checkpoint.skeleton(), self.weights).items()]
        lost = [(name, "", "stored in the checkpoint, but the network has no place for it") for name in self.checkpoint.unused]
        return (*coverage(self.space), *kept, *lost)

    def notes(self) -> tuple[str, ...]:
        """What the user should hear before anything is computed."""
        latency = [] if self.latency is None else [str(self.latency)]
        return (*self.segments.notes, *([self.architecture.note] if self.architecture.generic else []), *latency)

    def manifest(self, store: Store, table: Table, original: Original, points: list[Point]) -> Manifest:
        gained = gains(store) or {}
        notes = [*self.notes(), *(f"{name}: {gain}" for name, gain in gained.items())]
        if gained and (rest := [name for name in self.space.formats() if name not in gained]):
            notes.append(f"{', '.join(rest)}: not trained: too fine to gain anything, or of another kind")
        if any(held([choice.name for choice in d.choices], True) for d in self.space.decisions if d.unit.weights[0].name in self.nested):
            notes.append("Outside the blocks the finest integers alone are stored, too, and the others made of them untrained.")
        notes += closing.nesting(self.space, store, table, points)
        for decision in self.space.decisions:
            notes += [f"{w.name}: {note}" for w in decision.unit.weights for note in store.notes(w.name)]
        timed_on = {} if self.latency is None else {TIMED_ON: asdict(self.latency.device)}
        return Manifest(
            target=self.settings.target,
            recipe=self.settings.recipe,
            space=self.space,
            table=table,
            points=tuple(points),
            original=original,
            coverage=self.coverage(),
            notes=tuple(notes),
            provenance={**self.key, "data": self.segments.description, "data_digest": self.segments.digest, **timed_on},
            tied=self.source.tied,
            trust_remote_code=self.source.trust_remote_code,
        )


def num_probed(config: PretrainedConfig) -> int:
    """Search segments that sensitivities are measured on."""
    return NUM_PROBE_SEGMENTS * interface_of(config).segments


def versions() -> dict[str, str]:
    """Of everything whose change could change a family's bytes."""
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "numpy", "numba", "scipy", "gguf")},
    }
