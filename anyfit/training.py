"""The stage of a fit that makes variants better by gradients, where the recipe asks for it: all at once, or each format by itself.

The network is in memory, everything outside the blocks in its largest choice. Training leaves codes as they are and merges what was trained
into the scales that are stored; tuning changes codes, too. Formats that didn't gain on held-out text keep what they had.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.core.config import Config
from anyfit.core.errors import UserError
from anyfit.core.files import read_json, write_json
from anyfit.core.space import Decision, Space
from anyfit.distributed import ALONE, Group
from anyfit.elastic.linear import ElasticNetwork
from anyfit.elastic.nested import NestedNetwork
from anyfit.family.store import Store
from anyfit.formats import formats
from anyfit.formats.aqlm import AdditiveFormat
from anyfit.formats.base import Format, GridFormat
from anyfit.formats.nested import integer_sizes, packed
from anyfit.progress import Progress
from anyfit.recipes import base as recipes
from anyfit.scores.table import Table
from anyfit.tasks.language import Reference, kl
from anyfit.trainers import pv
from anyfit.trainers.bit_switching import BitSwitching
from anyfit.trainers.decoupled import Decoupled
from anyfit.trainers.loop import Settings, Trainable, train
from anyfit.trainers.losses import Objective
from anyfit.trainers.sampling import Sampler
from anyfit.tuning.coded import Stored, repacked, taken
from anyfit.tuning.refining import windows

FOLDER = "training"
"""In the journal while it lasts; `RESULT` is what is left."""
RESULT = "training.json"
MOST_BITS = 6.0
"""Stored bits per weight: what is finer loses too little to gain anything."""
NUM_WATCHED = 8
"""Held-out segments that are measured while training lasts."""
_CHECKPOINT, _MERGED = f"{FOLDER}/checkpoint.safetensors", f"{FOLDER}/merged.safetensors"


@dataclass(frozen=True)
class Gain:
    """Mean KL to the original in nats per held-out token with one format everywhere in the blocks, before and after."""

    before: float
    after: float
    nested: bool = False
    """All formats are made of one: each stays, better or not."""

    @property
    def kept(self) -> bool:
        return self.nested or self.after < self.before

    def __str__(self) -> str:
        if self.nested:
            return f"nested, KL {self.after:.4g} on held-out text, trained; stored by itself, by GPTQ and untrained, {self.before:.4g}"
        outcome = f"trained, KL {self.before:.4g} before and {self.after:.4g} after on held-out text"
        return outcome if self.kept else f"{outcome}; left as it was"

    @property
    def factor(self) -> float:
        """What is left of the loss."""
        return self.after / self.before if self.kept else 1.0


@dataclass
class Changes(ABC):
    """Makes the variants in a store better. `decisions`: `trained`. `largest` makes a second network, with each decision's largest
    choice; `matrices`: a config's, of the whole space. `text` and `held_out`: (segments, length). All processes of the `group` do the same;
    the first writes."""

    store: Store
    space: Space
    decisions: tuple[Decision, ...]
    original: PreTrainedModel
    largest: Callable[[], PreTrainedModel]
    matrices: Callable[[Config], list[Stored]]
    text: Tensor
    held_out: Tensor
    progress: Progress
    group: Group

    def run(self) -> None:
        """What a killed run has on file isn't made again. `FOLDER` is left for whoever called."""
        self._prepare()
        self.group.wait()
        if self.group.first:
            found = self._found()
            for unit, entries in self._choices.items():
                kept = {name: entry for name, entry in entries.items() if name in found and found[name].kept}
                self._rewrite(unit, next(iter(entries.values())).weight.name, kept)
            write_json(self.store.folder / RESULT, {name: asdict(gain) for name, gain in found.items()})

    @abstractmethod
    def _prepare(self) -> None:
        """Puts all that is to be stored into files, before any variant is changed."""

    @abstractmethod
    def _found(self) -> dict[str, Gain]:
        """{format: what it gained}, of what was prepared."""

    def _rewrite(self, unit: str, weight: str, entries: dict[str, Stored]) -> None:
        """Put what was prepared into the store, for the variants of one matrix that gained. It may be there already."""
        self.store.rewrite(weight, {name: self._bytes(entry, unit) for name, entry in entries.items()})

    @abstractmethod
    def _bytes(self, entry: Stored, unit: str) -> Tensor:
        """A variant as it is to be stored from now on. The store may hold it already."""

    @property
    def formats(self) -> list[str]:
        return list(dict.fromkeys(choice.name for decision in self.decisions for choice in decision.choices))

    @cached_property
    def _choices(self) -> dict[str, dict[str, Stored]]:
        return stored_choices(self.space, self.decisions, self.matrices)


@dataclass
class _AllAtOnce(Changes):
    """Trains all formats in one loop. `towards`: for what. `expected`: what the decided units and their choices lose untrained, asked for
    where sampler or losses want it."""

    sampler: type[Sampler]
    settings: Settings
    towards: Callable[[PreTrainedModel, Reference], Objective]
    expected: Callable[[], Table]

    def _prepare(self) -> None:
        if self.group.told((self.store.folder / _MERGED).exists()):
            return
        gained, merged = self._trained(Reference.of(self.original, windows(self.text)), Reference.of(self.original, self.held_out))
        if self.group.first:
            write_json(self.store.folder / FOLDER / RESULT, {name: asdict(gain) for name, gain in gained.items()})
            self.store.write_tensors(_MERGED, merged)

    def _found(self) -> dict[str, Gain]:
        found = gains(self.store, f"{FOLDER}/{RESULT}")
        assert found is not None
        return found

    @abstractmethod
    def _trained(self, text: Reference, held_out: Reference) -> tuple[dict[str, Gain], dict[str, Tensor]]:
        """What each format gained, and what is to be stored, by `_key`."""

    def _train(
        self,
        subject: Trainable,
        decisions: Sequence[Decision],
        expected: Callable[[], Table],
        measured: Callable[[Reference], Sequence[float]],
    ) -> None:
        """`measured`: the loss of every format on held-out text."""
        watched = cache(lambda: Reference.of(self.original, self.held_out[:NUM_WATCHED]))
        period = max(1, self.settings.num_steps // self.settings.num_periods)
        train(
            subject,
            self.sampler(decisions, period, expected() if self.sampler.knows_losses else None),
            self.settings,
            checkpoint=self.store.tensors(_CHECKPOINT) if self.group.told((self.store.folder / _CHECKPOINT).exists()) else {},
            keep=lambda state: self.store.write_tensors(_CHECKPOINT, state),
            progress=self.progress,
            held_out=lambda: math.fsum(measured(watched())),
            group=self.group,
        )

    @cached_property
    def _merged(self) -> dict[str, Tensor]:
        return self.store.tensors(_MERGED)


@dataclass
class Training(_AllAtOnce):
    """Trains all variants at once: a sampler draws configs at each step. `sharded`: processes hold the networks together; the largest then
    needs no numbers where its matrices are trained. `relative`: losses are divided by what is expected."""

    sharded: bool
    relative: bool

    def _trained(self, text: Reference, held_out: Reference) -> tuple[dict[str, Gain], dict[str, Tensor]]:
        network = ElasticNetwork(
            self.largest(), self.decisions, self._choices, self.settings.rank, self.settings.seed, self.group if self.sharded else ALONE
        )

        def measured(held_out: Reference) -> list[float]:
            if network.sharded:
                return [self._measured(network, name, held_out) for name in self.formats]
            return self.group.each(self.formats, lambda name: self._measured(network, name, held_out))

        before = measured(held_out)
        subject = Decoupled(network, self.towards(network.model, text), self.expected() if self.relative else None)
        self._train(subject, self.decisions, self.expected, measured)
        merged: dict[str, Tensor] = {}
        for (unit, name), variant in network.variants().items():
            parts = variant.merged()
            merged |= {_key(unit, name, part): value for part, value in parts.items()}
            variant.settle(parts)
        return {
            name: Gain(*figures) for name, figures in zip(self.formats, zip(before, measured(held_out), strict=True), strict=True)
        }, merged

    def _measured(self, network: ElasticNetwork, name: str, held_out: Reference) -> float:
        return kl(network.set(uniform(self.decisions, name)), held_out)

    def _bytes(self, entry: Stored, unit: str) -> Tensor:
        own = _key(unit, entry.format_.name, "")
        return repacked(entry.format_, entry.data, {key.removeprefix(own): v for key, v in self._merged.items() if key.startswith(own)})


@dataclass
class Tuning(Changes):
    """Tunes each format by itself, with all its matrices in the network: codes and scales."""

    settings: pv.Settings

    def _prepare(self) -> None:
        self.group.each(self.formats, self._tune)

    def _tune(self, name: str) -> None:
        if self._file(name, "json").exists():
            return
        own = {unit: entries[name] for unit, entries in self._choices.items() if name in entries}
        matrices = {entry.weight.name: entry.matrix(self.original) for entry in own.values()}
        checkpoint = f"{FOLDER}/{name} checkpoint.safetensors"
        tuned = pv.tune(
            self._network,
            matrices,
            self._text,
            self._held_out,
            settings=self.settings,
            progress=self.progress,
            checkpoint=self.store.tensors(checkpoint) if (self.store.folder / checkpoint).exists() else {},
            keep=lambda state: self.store.write_tensors(checkpoint, state),
        )
        data = {unit: tuned.coded[entry.weight.name].data for unit, entry in own.items()}
        self.store.write_tensors(f"{FOLDER}/{name}.safetensors", data)
        write_json(self._file(name, "json"), asdict(Gain(tuned.before, tuned.after)))
        (self.store.folder / checkpoint).unlink(missing_ok=True)

    def _found(self) -> dict[str, Gain]:
        found = {name: read_json(self._file(name, "json")) for name in self.formats}
        return {name: Gain(**figures) for name, figures in found.items() if figures is not None}

    @cached_property
    def _network(self) -> PreTrainedModel:
        return self.largest()

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


@dataclass
class Nesting(_AllAtOnce):
    """Trains one matrix of integers for all formats that can be nested, and stores that alone.

    `Gain.before` is what each format had by itself. `scale_rate` and `shares`: see `BitSwitching`.
    """

    scale_rate: float
    shares: Mapping[int, float]

    @cached_property
    def sizes(self) -> dict[str, int]:
        return nested_sizes(self.decisions)

    def _trained(self, text: Reference, held_out: Reference) -> tuple[dict[str, Gain], dict[str, Tensor]]:
        model, names = self.largest(), list(self.sizes)
        paths = {d.unit.name: d.unit.weights[0].name.removesuffix(".weight") for d in self.decisions}
        before = self.group.each(names, lambda name: self._by_itself(model, name, held_out))
        self._put(model, {path: self.original.get_parameter(f"{path}.weight") for path in paths.values()})
        transposed = {d.unit.weights[0].name.removesuffix(".weight") for d in self.decisions if d.unit.weights[0].transposed}
        network = NestedNetwork(model, list(paths.values()), list(self.sizes.values()), _grid(names[0]).group, transposed)
        subject = BitSwitching(
            network,
            self.towards(model, text),
            scale_rate=self.scale_rate,
            adaptive=not self.settings.together,  # a rate for each size takes an update for each
            shares=self.shares,
            rest=False,
        )

        def expected() -> Table:
            """With the network's own names for units and choices."""
            table, bits = self.expected(), {name: str(size) for name, size in self.sizes.items()}
            errors = {paths[unit]: {bits[name]: value for name, value in own.items() if name in bits} for unit, own in table.errors.items()}
            return Table({paths[unit]: value for unit, value in table.sensitivity.items()}, errors)

        sized = {name: uniform(network.decisions, str(bits)) for name, bits in self.sizes.items()}

        def measured(held_out: Reference) -> list[float]:
            return self.group.each(names, lambda name: kl(cast(PreTrainedModel, network.set(sized[name])), held_out))

        self._train(subject, network.decisions, expected, measured)
        network.settle()
        stored = network.stored()
        found = {_key(unit, "nested", "integers"): stored[path].integers.cpu() for unit, path in paths.items()}
        found |= {_key(unit, "nested", "scale"): stored[path].scale.squeeze(-1).half().cpu() for unit, path in paths.items()}
        return {
            n: Gain(*figures, nested=True) for n, figures in zip(names, zip(before, measured(held_out), strict=True), strict=True)
        }, found

    def _by_itself(self, model: PreTrainedModel, name: str, held_out: Reference) -> float:
        entries = [own[name] for own in self._choices.values() if name in own]
        self._put(model, {entry.weight.name.removesuffix(".weight"): entry.values() for entry in entries})
        return kl(model, held_out)

    @torch.no_grad()
    def _put(self, model: PreTrainedModel, values: dict[str, Tensor]) -> None:
        for path, value in values.items():
            model.get_parameter(f"{path}.weight").copy_(value)

    def _rewrite(self, unit: str, weight: str, entries: dict[str, Stored]) -> None:
        high, *lows = (name for name in self.sizes if name in entries)
        self.store.nest(weight, high, self._bytes(entries[high], unit), lows)

    def _bytes(self, entry: Stored, unit: str) -> Tensor:
        assert isinstance(entry.format_, GridFormat)
        parts = (taken(self._merged[_key(unit, "nested", part)], entry.order) for part in ("integers", "scale"))
        return packed(entry.format_, *parts)


def nested_sizes(decisions: Iterable[Decision]) -> dict[str, int]:
    """{format: bits} of the choices that can be made of the finest of them, which is the first. Raises `UserError` where they are fewer
    than two."""
    names = list(dict.fromkeys(choice.name for decision in decisions for choice in decision.choices))
    found = integer_sizes(names)
    if len(found) < 2:
        raise UserError(
            f"No two of the formats that the blocks can have are nested in each other: {', '.join(names)}.",
            remedy="Leave out --formats, name several symmetric ones, or take another target.",
        )
    return found


def nested(decisions: Iterable[Decision]) -> tuple[Decision, ...]:
    """With those choices alone that can be nested."""
    decisions = list(decisions)
    names = nested_sizes(decisions)
    return tuple(replace(d, choices=tuple(choice for choice in d.choices if choice.name in names)) for d in decisions)


def _grid(name: str) -> GridFormat:
    format_ = formats.get(name)
    assert isinstance(format_, GridFormat)
    return format_


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


def decided(space: Space, how: recipes.Training | recipes.Tuning | recipes.Nesting) -> tuple[Decision, ...]:
    """What a recipe's stage trains of a space."""
    return trained(space, math.inf, kinds=(GridFormat,)) if isinstance(how, recipes.Nesting) else trained(space)


def trained(
    space: Space, most_bits: float = MOST_BITS, *, kinds: tuple[type[Format], ...] = (GridFormat, AdditiveFormat)
) -> tuple[Decision, ...]:
    """The decisions about one matrix of a block, with the choices that training has something to gain from: few bits, of these kinds."""
    found = []
    for decision in space.decisions:
        weights, most = decision.unit.weights, most_bits * decision.unit.num_weights / 8
        choices = tuple(c for c in decision.choices if c.stored_bytes <= most and isinstance(formats.get(c.name), kinds))
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
    return None if found is None else {name: Gain(**entry) for name, entry in found.items()}


def _key(unit: str, choice: str, part: str) -> str:
    return f"{unit} {choice} {part}"
