"""Training every number of one network: what brings back a part of what pruning took."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from anyfit.core.config import Config
from anyfit.trainers.loop import Trainable
from anyfit.trainers.losses import Objective
from anyfit.trainers.sampling import Draws


class Whole(Trainable):
    """`model` runs as one config only, of so many `bits` a weight."""

    def __init__(self, model: PreTrainedModel, objective: Objective, bits: float) -> None:
        self.objective, self._bits = objective, bits
        self.groups = {"numbers": dict(model.named_parameters())}

    def set(self, config: Config) -> None:
        """There is no other."""

    def bits(self, config: Config) -> float:
        return self._bits


class Always(Draws):
    """One config at every step."""

    def __init__(self, config: Config) -> None:
        self._config = config

    def draws(self, step: int, seed: int) -> Sequence[Config]:
        return [self._config]
