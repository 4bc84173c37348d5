"""Training one network whose matrices have variants of their own for each choice: each config trains what it draws."""

from __future__ import annotations

from anyfit.core.config import Config
from anyfit.elastic.linear import ElasticNetwork
from anyfit.trainers.loop import Trainable
from anyfit.trainers.losses import Objective


class Decoupled(Trainable):
    """What is trained of the network's variants."""

    def __init__(self, network: ElasticNetwork, objective: Objective) -> None:
        self.network, self.objective = network, objective
        self.sharded = network.sharded
        trained = {id(value) for variant in network.variants().values() for value in variant.trained()}
        parameters = dict(network.model.named_parameters())
        for value in parameters.values():
            value.requires_grad_(False)
        self.groups = {"variants": {name: value for name, value in parameters.items() if id(value) in trained}}

    def set(self, config: Config) -> None:
        self.network.set(config)

    def bits(self, config: Config) -> float:
        sizes = [(d.choice(config[d.key]).stored_bytes, d.unit.num_weights) for d in self.network.decisions]
        return 8 * sum(size for size, _ in sizes) / sum(num for _, num in sizes)
