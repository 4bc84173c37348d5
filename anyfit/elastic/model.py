"""A network that can run as any config of its space."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.activations import Rounding, round_inputs
from anyfit.core.config import Config
from anyfit.core.space import Space
from anyfit.core.units import Weight


class Decoded(Protocol):
    """Variants as numbers: float32, in the checkpoint's own shape and row order."""

    def __call__(self, weight: Weight, choice: str, /) -> Tensor:
        """A whole matrix under one of its unit's choices."""

    def rows(self, weight: Weight, choice: str, which: Tensor | slice, /) -> Tensor:
        """Some rows of the embedding or the head."""

    def inputs(self, weight: Weight, choice: str, /) -> Rounding | None:
        """How what it multiplies is rounded first under that choice; None where it isn't."""


class ElasticModel:
    """One network in memory whose units are switched in place between their variants.

    Storage is *decoupled*: each choice has its own codes, decoded when it is set. `model` is an ordinary
    transformers model; under `set(config)` its outputs are those of the model extracted at that config.
    """

    def __init__(self, model: PreTrainedModel, space: Space, decoded: Decoded) -> None:
        self.model = model
        self.space = space
        self._decoded = decoded
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._now: dict[str, str] = {}

    @torch.no_grad()
    def set(self, config: Config) -> PreTrainedModel:
        """Run as `config` from now on; only units that change are touched."""
        for decision in self.space.decisions:
            chosen = config[decision.key]
            if self._now.get(decision.unit.name) == chosen:
                continue
            for weight in decision.unit.weights:
                parameter = self._parameters[weight.name]
                parameter.copy_(self._decoded(weight, chosen))
                round_inputs(self.model.get_submodule(weight.name.rpartition(".")[0]), self._decoded.inputs(weight, chosen))
            self._now[decision.unit.name] = chosen
        return self.model

    @contextmanager
    def lent(self, config: Config) -> Iterator[PreTrainedModel]:
        """The network at `config`, for someone who changes its parameters: none is counted on afterwards."""
        try:
            yield self.set(config)
        finally:
            self._now.clear()
