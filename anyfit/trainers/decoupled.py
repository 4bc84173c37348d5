"""Training one network whose matrices have variants of their own for each choice: each config trains what it draws."""

from __future__ import annotations

from functools import cached_property

from anyfit.core.config import Config
from anyfit.elastic.linear import ElasticNetwork
from anyfit.trainers.loop import Trainable
from anyfit.trainers.losses import Objective
from anyfit.trainers.sampling import Expected

MOST_SHARE = 1000.0
"""Times as much as that of the config that is expected to lose most a loss counts at most."""


class Decoupled(Trainable):
    """What is trained of the network's variants.

    `expected`: what units and their choices are expected to lose untrained. Each loss is then divided by what its config is expected to
    lose. Losses at two bits are twenty times those at four, so that a variant of four bits would else serve the few steps in which its
    neighbours have two.
    """

    def __init__(self, network: ElasticNetwork, objective: Objective, expected: Expected | None = None) -> None:
        self.network, self.objective, self.expected = network, objective, expected
        self.sharded = network.sharded
        trained = {id(value) for variant in network.variants().values() for value in variant.trained()}
        parameters = dict(network.model.named_parameters())
        for value in parameters.values():
            value.requires_grad_(False)
        self.groups = {"variants": {name: value for name, value in parameters.items() if id(value) in trained}}

    def set(self, config: Config) -> None:
        self.network.set(config)

    def share(self, config: Config) -> float:
        if self.expected is None:
            return 1.0
        return self._most / max(self._lost(config), self._most / MOST_SHARE)

    @cached_property
    def _most(self) -> float:
        """What the smallest choices are expected to lose."""
        smallest = {d.key: min(d.choices, key=lambda choice: choice.stored_bytes).name for d in self.network.decisions}
        return self._lost(Config(smallest)) or 1.0

    def _lost(self, config: Config) -> float:
        assert self.expected is not None
        return sum(self.expected.score(d.unit.name, config[d.key]) for d in self.network.decisions)

    def bits(self, config: Config) -> float:
        sizes = [(d.choice(config[d.key]).stored_bytes, d.unit.num_weights) for d in self.network.decisions]
        return 8 * sum(size for size, _ in sizes) / sum(num for _, num in sizes)
