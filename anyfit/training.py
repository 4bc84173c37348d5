"""The stage of a fit that makes variants better by gradients, where the recipe asks for it: all at once, or each format by itself.

The network is in memory, everything outside the blocks in its largest choice. Training leaves codes as they are and merges what was trained
into the scales that are stored; tuning changes codes, too. Formats that didn't gain on held-out text keep what they had.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from anyfit.core.config import Config
from anyfit.core.files import read_json, remove, write_json
from anyfit.core.space import Decision, Space
from anyfit.elastic.linear import ElasticNetwork
from anyfit.family.store import Store
from anyfit.formats.base import GridFormat
from anyfit.progress import Progress
from anyfit.tasks.language import Reference, kl
from anyfit.trainers.loop import Divergence, Settings, train
from anyfit.trainers.sampling import Sampler
from anyfit.tuning import pv
from anyfit.tuning.coded import Stored
from anyfit.tuning.refining import windows

FOLDER = "training"
"""In the journal while it lasts; `RESULT` is what is left."""
RESULT = "training.json"
MOST_BITS = 6.0
"""Stored bits per weight: what is finer loses too little to gain anything."""
_CHECKPOINT, _MERGED = f"{FOLDER}/checkpoint.safetensors", f"{FOLDER}/merged.safetensors"


@dataclass(frozen=True)
class Gain:
    """Mean KL to the original in nats per held-out token with one format everywhere in the blocks, before and after."""

    before: float
    after: float

    @property
    def kept(self) -> bool:
        return self.after < self.before

    def __str__(self) -> str:
        outcome = f"trained, KL {self.before:.4g} before and {self.after:.4g} after on held-out text"
        return outcome if self.kept else f"{outcome}; left as it was"

    @property
    def factor(self) -> float:
        """What is left of the loss."""
        return self.after / self.before if self.kept else 1.0


@dataclass
class Changes(ABC):
    """Makes the variants in a store better. `decisions`: `trained`. `largest` makes a second network, with each decision's largest
    choice; `matrices`: a config's, of the whole space. `text` and `held_out`: (segments, length)."""

    store: Store
    space: Space
    decisions: tuple[Decision, ...]
    original: PreTrainedModel
    largest: Callable[[], PreTrainedModel]
    matrices: Callable[[Config], list[Stored]]
    text: Tensor
    held_out: Tensor
    progress: Progress

    def run(self) -> dict[str, Gain]:
        """{format: what it gained}; what was done before isn't done again."""
        found = gains(self.store)
        if found is None:
            found = self._prepared()
            stored = self._stored()
            for unit, entries in stored.items():
                changed = {name: self._bytes(entry, unit) for name, entry in entries.items() if found[name].kept}
                self.store.rewrite(next(iter(entries.values())).weight.name, changed)
            write_json(self.store.folder / RESULT, {name: [gain.before, gain.after] for name, gain in found.items()})
        remove(self.store.folder / FOLDER)
        return found

    @abstractmethod
    def _prepared(self) -> dict[str, Gain]:
        """What each format gained, once all that is to be stored lies in files: before any variant is changed."""

    @abstractmethod
    def _bytes(self, entry: Stored, unit: str) -> Tensor:
        """A variant as it is to be stored from now on. The store may hold it already."""

    @property
    def formats(self) -> list[str]:
        return list(dict.fromkeys(choice.name for decision in self.decisions for choice in decision.choices))

    def _stored(self) -> dict[str, dict[str, Stored]]:
        return stored_choices(self.space, self.decisions, self.matrices)


@dataclass
class Training(Changes):
    """Trains all variants at once: a sampler draws a config at each step."""

    sampler: type[Sampler]
    settings: Settings
    sensitivity: Callable[[], dict[str, float]]
    """Of the decided units, by name: asked for where the sampler wants it."""

    def _prepared(self) -> dict[str, Gain]:
        if not (self.store.folder / _MERGED).exists():
            network = ElasticNetwork(self.largest(), self.decisions, self._stored(), self.settings.rank, self.settings.seed)
            held_out = Reference.of(self.original, self.held_out)
            before = {name: self._measured(network, name, held_out) for name in self.formats}
            train(
                Divergence(network, Reference.of(self.original, windows(self.text)), self.settings),
                self._sampler(),
                self.settings,
                checkpoint=self.store.tensors(_CHECKPOINT) if (self.store.folder / _CHECKPOINT).exists() else {},
                keep=lambda state: self.store.write_tensors(_CHECKPOINT, state),
                progress=self.progress,
            )
            merged: dict[str, Tensor] = {}
            for (unit, name), variant in network.variants().items():
                if (scales := variant.merged()) is not None:
                    merged |= {_key(unit, name, part): value for part, value in scales.stored.items()}
                    variant.settle(scales)
            after = {name: self._measured(network, name, held_out) for name in self.formats}
            write_json(self.store.folder / FOLDER / RESULT, {name: [before[name], after[name]] for name in self.formats})
            self.store.write_tensors(_MERGED, merged)
        found = gains(self.store, f"{FOLDER}/{RESULT}")
        assert found is not None
        return found

    def _sampler(self) -> Sampler:
        period = max(1, self.settings.num_steps // self.settings.num_periods)
        return self.sampler(self.decisions, period, self.sensitivity() if self.sampler.learns_sensitivity else None)

    def _measured(self, network: ElasticNetwork, name: str, held_out: Reference) -> float:
        return kl(network.set(uniform(self.decisions, name)), held_out)

    @cached_property
    def _merged(self) -> dict[str, Tensor]:
        return self.store.tensors(_MERGED)

    def _bytes(self, entry: Stored, unit: str) -> Tensor:
        assert isinstance(entry.format_, GridFormat)
        codes, scales = entry.format_.read(entry.data)
        stored = {part: self._merged.get(_key(unit, entry.format_.name, part), value) for part, value in scales.stored.items()}
        return entry.format_.pack(codes, entry.format_.assemble(stored))


@dataclass
class Tuning(Changes):
    """Tunes each format by itself, with all its matrices in the network: codes and scales."""

    settings: pv.Settings

    def _prepared(self) -> dict[str, Gain]:
        stored, network, found = self._stored(), self.largest(), {}
        for name in self.formats:
            if read_json(self._file(name, "json")) is None:
                matrices = {own[name].weight.name: own[name].matrix(self.original) for own in stored.values() if name in own}
                tuned = pv.tune(network, matrices, self._text, self._held_out, settings=self.settings, progress=self.progress)
                data = {unit: tuned.coded[own[name].weight.name].data for unit, own in stored.items() if name in own}
                self.store.write_tensors(f"{FOLDER}/{name}.safetensors", data)
                write_json(self._file(name, "json"), {"before": tuned.before, "after": tuned.after})
            figures = read_json(self._file(name, "json"))
            assert figures is not None
            found[name] = Gain(**figures)
        return found

    def _file(self, name: str, suffix: str) -> Path:
        return self.store.folder / FOLDER / f"{name}.{suffix}"

    @cached_property
    def _text(self) -> Reference:
        return Reference.of(self.original, windows(self.text))

    @cached_property
    def _held_out(self) -> Reference:
        return Reference.of(self.original, self.held_out)

    @cached_property
    def _data(self) -> dict[str, dict[str, Tensor]]:
        return {name: self.store.tensors(f"{FOLDER}/{name}.safetensors") for name in self.formats}

    def _bytes(self, entry: Stored, unit: str) -> Tensor:
        return self._data[entry.format_.name][unit]


def stored_choices(space: Space, decisions: Iterable[Decision], matrices: Callable[[Config], list[Stored]]) -> dict[str, dict[str, Stored]]:
    """{unit: {choice: its matrix}} of these decisions. `matrices`: a config's, of the whole `space`."""
    about = {decision.unit.weights[0].name: decision for decision in decisions}
    found: dict[str, dict[str, Stored]] = {decision.unit.name: {} for decision in about.values()}
    for name in space.formats():
        for entry in matrices(space.uniform(name)):
            decision = about.get(entry.weight.name)
            if decision and any(choice.name == entry.format_.name for choice in decision.choices):
                found[decision.unit.name][entry.format_.name] = entry
    return found


def trained(space: Space) -> tuple[Decision, ...]:
    """The decisions about one matrix of a block, with the choices that training has something to gain from."""
    found = []
    for decision in space.decisions:
        weights = decision.unit.weights
        choices = tuple(choice for choice in decision.choices if 8 * choice.stored_bytes <= MOST_BITS * decision.unit.num_weights)
        if len(weights) == 1 and weights[0].block is not None and choices:
            found.append(replace(decision, choices=choices))
    return tuple(found)


def uniform(decisions: Iterable[Decision], name: str) -> Config:
    """One format everywhere; where it isn't a choice, the largest."""
    return Config(
        {d.key: name if any(c.name == name for c in d.choices) else max(d.choices, key=lambda c: c.stored_bytes).name for d in decisions}
    )


def gains(store: Store, name: str = RESULT) -> dict[str, Gain] | None:
    """What training brought, by format; None where it hasn't come to its end."""
    found = read_json(store.folder / name)
    return None if found is None else {name: Gain(*entry) for name, entry in found.items()}


def _key(unit: str, choice: str, part: str) -> str:
    return f"{unit} {choice} {part}"
