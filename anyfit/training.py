"""The stage of a fit that trains every variant at once, where the recipe asks for it.

The network is in memory, its matrices in the blocks elastic, everything else in its largest choice. What was trained is merged
into the scales that are stored; codes stay. Formats that didn't gain on held-out text keep what they had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

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
class Training:
    """Trains the variants in a store. `decisions`: `trained`. `largest` makes a second network, with each decision's largest choice;
    `matrices`: a config's, of the whole space. `text` and `held_out`: (segments, length)."""

    store: Store
    space: Space
    decisions: tuple[Decision, ...]
    original: PreTrainedModel
    largest: Callable[[], PreTrainedModel]
    matrices: Callable[[Config], list[Stored]]
    sampler: type[Sampler]
    settings: Settings
    text: Tensor
    held_out: Tensor
    progress: Progress

    def run(self) -> dict[str, Gain]:
        """{format: what it gained}; what was done before isn't done again."""
        found = gains(self.store)
        if found is None:
            merged = self._merged()
            found = gains(self.store, f"{FOLDER}/{RESULT}")
            assert found is not None
            for unit, stored in self._stored().items():
                changed = {name: self._bytes(entry, unit, merged) for name, entry in stored.items() if found[name].kept}
                self.store.rewrite(next(iter(stored.values())).weight.name, changed)
            write_json(self.store.folder / RESULT, {name: [gain.before, gain.after] for name, gain in found.items()})
        remove(self.store.folder / FOLDER)
        return found

    def _merged(self) -> dict[str, Tensor]:
        """What is stored of the trained scales. Kept in a file before any variant is changed."""
        if not (self.store.folder / _MERGED).exists():
            network = ElasticNetwork(self.largest(), self.decisions, self._stored(), self.settings.rank, self.settings.seed)
            held_out = Reference.of(self.original, self.held_out)
            names = list(dict.fromkeys(choice.name for decision in self.decisions for choice in decision.choices))
            before = {name: self._measured(network, name, held_out) for name in names}
            train(
                Divergence(network, Reference.of(self.original, windows(self.text)), self.settings),
                self.sampler(self.decisions, max(1, self.settings.num_steps // self.settings.num_periods)),
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
            after = {name: self._measured(network, name, held_out) for name in names}
            result = {name: [before[name], after[name]] for name in names}
            write_json(self.store.folder / FOLDER / RESULT, result)
            self.store.write_tensors(_MERGED, merged)
        return self.store.tensors(_MERGED)

    def _measured(self, network: ElasticNetwork, name: str, held_out: Reference) -> float:
        return kl(network.set(uniform(self.decisions, name)), held_out)

    def _stored(self) -> dict[str, dict[str, Stored]]:
        return stored_choices(self.space, self.decisions, self.matrices)

    def _bytes(self, entry: Stored, unit: str, merged: Mapping[str, Tensor]) -> Tensor:
        """A variant with what was trained of its scales."""
        assert isinstance(entry.format_, GridFormat)
        codes, scales = entry.format_.read(entry.data)
        stored = {part: merged.get(_key(unit, entry.format_.name, part), value) for part, value in scales.stored.items()}
        return entry.format_.pack(codes, entry.format_.assemble(stored))


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
