"""A space: every decision that a target leaves open, with the exact cost of each choice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from anyfit.core.config import FORMAT, Config
from anyfit.core.units import Unit


@dataclass(frozen=True)
class Choice:
    """One option. `bytes_` is what it adds to the written file, padding included."""

    name: str
    bytes_: int
    stored_bytes: int
    """The tensor's own bytes, without padding: what bits per weight are counted from."""


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
    """

    decisions: tuple[Decision, ...]
    fixed_bytes: int
    fixed_stored_bytes: int
    num_parameters: int

    def bytes_(self, config: Config) -> int:
        """Size of the file that this config is written to."""
        return self.fixed_bytes + sum(d.choice(config[d.key]).bytes_ for d in self.decisions)

    def bits(self, config: Config) -> float:
        """Stored bits per weight over every tensor of the file; metadata and padding are not weights."""
        stored = self.fixed_stored_bytes + sum(d.choice(config[d.key]).stored_bytes for d in self.decisions)
        return 8 * stored / self.num_parameters

    def costs(self, config: Config) -> dict[str, float]:
        return {"bytes": self.bytes_(config), "bits": self.bits(config)}

    def formats(self) -> list[str]:
        """Every format that is a choice somewhere, smallest first."""
        sizes: Counter[str] = Counter()
        weights: Counter[str] = Counter()
        for decision in self.decisions:
            for choice in decision.choices:
                sizes[choice.name] += choice.stored_bytes
                weights[choice.name] += decision.unit.num_weights
        return sorted(sizes, key=lambda name: (sizes[name] / weights[name], name))

    def uniform(self, name: str, keep: Mapping[str, str] | None = None) -> Config | None:
        """One format everywhere, but for the units that `keep` names; None where a unit can't take it."""
        keep = keep or {}
        formats = {d.unit.name: keep.get(d.unit.name, name) for d in self.decisions}
        if any(all(c.name != formats[d.unit.name] for c in d.choices) for d in self.decisions):
            return None
        return Config.of_formats(formats)

    def smallest(self) -> Config:
        return Config({d.key: min(d.choices, key=lambda c: (c.bytes_, c.name)).name for d in self.decisions})

    def largest(self) -> Config:
        return Config({d.key: max(d.choices, key=lambda c: (c.bytes_, c.name)).name for d in self.decisions})


def coverage(space: Space) -> Iterable[tuple[str, str, str]]:
    """(unit, format, reason) for everything that the target's rules took off the menu."""
    for decision in space.decisions:
        for name, reason in decision.refused.items():
            yield decision.unit.name, name, reason
