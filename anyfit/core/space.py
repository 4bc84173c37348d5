"""A space: every decision that a target leaves open, with the exact cost of each choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from anyfit.core.budget import BITS, BYTES, LATENCY, WEIGHTS, WHOLE, units
from anyfit.core.config import FORMAT, Config, format_of
from anyfit.core.units import Unit


@dataclass(frozen=True)
class Choice:
    """One option. `bytes_` is what it adds to the written file, padding included. `others`: what it adds to costs besides, by name."""

    name: str
    bytes_: int
    stored_bytes: int
    """The tensor's own bytes, without padding: what bits per weight are counted from."""
    others: Mapping[str, float] = field(default_factory=dict)
    uniform: bool = True
    """Whether this everywhere is a setting that people use, and so one that a search has to beat."""


@dataclass(frozen=True)
class Decision:
    """One unit on one axis. `refused` says of each format that isn't a choice here why not."""

    unit: Unit
    choices: tuple[Choice, ...]
    axis: str = FORMAT
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        return self.unit.name, self.axis

    def choice(self, name: str) -> Choice:
        return next(choice for choice in self.choices if choice.name == name)


@dataclass(frozen=True)
class Space:
    """The decisions, and what the written file holds besides them.

    `fixed_bytes`: metadata, tokenizer, norms, biases, with padding. `fixed_stored_bytes`: the tensors among
    these. `num_parameters`: all of the network's, so that bits per weight count everything that is stored.
    `others`: costs besides these two that choices add to, and what is in them whatever is chosen.
    """

    decisions: tuple[Decision, ...]
    fixed_bytes: int
    fixed_stored_bytes: int
    num_parameters: int
    others: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for decision in self.decisions:
            assert all(choice.others.keys() == self.others.keys() for choice in decision.choices), decision.unit.name

    @property
    def scale(self) -> str:
        """The cost that sizes are told apart by: latency where it was measured, the weights that are kept where all files are alike."""
        return next((cost for cost in (LATENCY, WEIGHTS) if cost in self.others), BYTES)

    def bytes_(self, config: Config) -> int:
        """Size of the file that this config is written to."""
        return self.fixed_bytes + sum(d.choice(config[d.key]).bytes_ for d in self.decisions)

    def bits(self, config: Config) -> float:
        """Stored bits per weight over every tensor of the file; metadata and padding are not weights."""
        stored = self.fixed_stored_bytes + sum(d.choice(config[d.key]).stored_bytes for d in self.decisions)
        return 8 * stored / self.num_parameters

    def costs(self, config: Config) -> dict[str, float]:
        """Every cost that a budget can bound, by name."""
        others = {name: self._total(name, [d.choice(config[d.key]).others[name] for d in self.decisions]) for name in self.others}
        return {BYTES: self.bytes_(config), BITS: self.bits(config), **others}

    def original(self, bytes_: int) -> dict[str, float]:
        """What percentages and speed-ups are taken of: `bytes_` of the original's weight files, and what else the largest config costs."""
        return {**self.costs(self.largest()), BYTES: bytes_}

    def _total(self, cost: str, added: Iterable[float]) -> float:
        """What is fixed and what is added of a cost besides bytes and bits, counted in whole units."""
        return sum(units(cost, value) for value in (self.others[cost], *added)) * WHOLE.get(cost, 1)

    def formats(self) -> list[str]:
        """Every format that is a choice somewhere, smallest first."""
        return list(self.format_bits())

    def format_bits(self) -> dict[str, float]:
        """Stored bits per weight of each format, over the units that can take it, smallest first."""
        sizes: Counter[str] = Counter()
        weights: Counter[str] = Counter()
        for decision in self.decisions:
            for choice in decision.choices:
                sizes[choice.name] += 8 * choice.stored_bytes
                weights[choice.name] += decision.unit.num_weights
        bits = {name: sizes[name] / weights[name] for name in sizes}
        return dict(sorted(bits.items(), key=lambda item: (item[1], item[0])))

    def uniform(self, name: str) -> Config:
        """One choice everywhere; a unit that can't take it gets its smallest that isn't smaller, or its largest: of those in the same
        format, where there are any."""
        bits = self.format_bits()
        chosen = {}
        for decision in self.decisions:
            alike = [c for c in decision.choices if format_of(c.name) == format_of(name)] or decision.choices
            own = {c.name: 8 * c.stored_bytes / decision.unit.num_weights for c in alike}
            if name in own:
                chosen[decision.key] = name
                continue
            enough = [c for c in own if own[c] >= bits[name]]
            chosen[decision.key] = min(enough, key=lambda c: (own[c], c)) if enough else max(own, key=lambda c: (own[c], c))
        return Config(chosen)

    def uniforms(self) -> list[str]:
        """The choices that are settings by themselves, smallest first."""
        known = {c.name for d in self.decisions for c in d.choices if c.uniform}
        return [name for name in self.formats() if name in known]

    def least(self, cost: str) -> float:
        """The least that a config can have of a cost."""
        if cost == BITS:
            return 8 * (self.fixed_stored_bytes + sum(min(c.stored_bytes for c in d.choices) for d in self.decisions)) / self.num_parameters
        if cost == BYTES:
            return self.fixed_bytes + sum(min(c.bytes_ for c in d.choices) for d in self.decisions)
        return self._total(cost, [min(c.others[cost] for c in d.choices) for d in self.decisions])

    def smallest(self) -> Config:
        """Of the fewest bytes, and of the least of what else choices cost where these are equal."""
        return Config({d.key: min(d.choices, key=_weight).name for d in self.decisions})

    def largest(self) -> Config:
        return Config({d.key: max(d.choices, key=_weight).name for d in self.decisions})


def _weight(choice: Choice) -> tuple[float | str, ...]:
    return choice.bytes_, *choice.others.values(), choice.name


def coverage(space: Space) -> Iterable[tuple[str, str, str]]:
    """(unit, format, reason) for everything that the target's rules took off the menu."""
    for decision in space.decisions:
        for name, reason in decision.refused.items():
            yield decision.unit.name, name, reason
