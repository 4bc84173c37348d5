"""The network of one config, whatever its size: what a written model is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from anyfit.activations import Rounding, roundings, unrounded
from anyfit.architectures import architecture_of
from anyfit.checkpoint import Source
from anyfit.core import memory
from anyfit.core.budget import BYTES, describe
from anyfit.core.config import Config
from anyfit.core.units import Weight
from anyfit.elastic.model import Decoded
from anyfit.elastic.stream import Chosen, Unrounded
from anyfit.interface import interface_of
from anyfit.streaming import Original, Predictions, Stream, some_rows
from anyfit.tasks.base import Outputs

SPACE = 2.5
"""Times the network's size in float32, that loading it may take."""


class Extracted:
    """Nothing is in memory but what was asked for last. `folder` takes hidden states."""

    def __init__(self, source: Source, config: Config, decoded: Decoded, folder: Path) -> None:
        self.source = source
        self.skeleton = source.skeleton()
        architecture = architecture_of(self.skeleton)
        self.weights = {weight.name: weight for weight in architecture.weights(self.skeleton)}
        self._numbers = Chosen(Original(source), decoded, config.chosen)
        # Now: while a network's frame is made, no other thread may make one.
        self._stream = Stream(source, architecture, folder, self._numbers)

    def weight(self, name: str) -> Weight | None:
        """The decided matrix that a parameter is, by any of its names."""
        return self.weights.get(self.source.tied.get(name, name))

    def parameter(self, name: str) -> Tensor:
        """Float32, in the checkpoint's orientation."""
        weight = self.weight(name)
        return (self._numbers.matrix(weight) if weight else self.source.read(name)).float()

    def rows(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """A parameter, its rows some at a time where it is the embedding or the head."""
        weight = self.weight(name)
        if weight is None or weight.role not in ("embedding", "head") or weight.transposed:
            values = self.parameter(name)
            yield slice(0, len(values)), values
            return
        yield from ((rows, self._numbers.rows(weight, rows)) for rows in some_rows(weight.shape[0]))

    @property
    def config(self) -> PretrainedConfig:
        return self.skeleton.config

    def rounding(self, name: str) -> Rounding | None:
        """How what a decided matrix multiplies is rounded first; None where it isn't."""
        return self._numbers.inputs(self.weights[name])

    def outputs(self, tokens: Tensor, *, rounded: bool = True) -> Predictions:
        """What comes out for tokens (segments, length); with `rounded` False as if nothing were rounded on the way."""
        return self._stream.predictions(tokens, self._numbers if rounded else Unrounded(self._numbers))

    def too_large(self) -> str | None:
        """Why a reader that loads the whole network can't be asked; None where there is room."""
        size, free = 4 * sum(parameter.numel() for parameter in self.skeleton.parameters()), memory.free()
        if free is None or SPACE * size < free:
            return None
        needed, there = describe(BYTES, SPACE * size), describe(BYTES, free)
        return f"it would hold the whole network in memory, which takes up to {needed}, and {there} are free"


class InMemory:
    """A whole network, asked as an `Extracted` is. `runs`: one that computes the same, and is run in its stead."""

    def __init__(self, model: PreTrainedModel, runs: PreTrainedModel | None = None) -> None:
        self.model = self.skeleton = model
        self._runs = model if runs is None else runs

    def weight(self, name: str) -> Weight | None:
        """What is known of a matrix; None for anything else."""
        return self.weights.get(name)

    @cached_property
    def weights(self) -> dict[str, Weight]:
        return {weight.name: weight for weight in architecture_of(self.model).weights(self.model)}

    def parameter(self, name: str) -> Tensor:
        return self.model.get_parameter(name)

    def rows(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """A parameter, all of its rows."""
        values = self.parameter(name)
        yield slice(0, len(values)), values

    @property
    def config(self) -> PretrainedConfig:
        return self.model.config

    def rounding(self, name: str) -> Rounding | None:
        return roundings(self.model).get(name.rpartition(".")[0])

    def outputs(self, tokens: Tensor, *, rounded: bool = True) -> Outputs:
        interface = interface_of(self.config)

        def run(tokens: Tensor) -> Tensor:
            with torch.inference_mode(), nullcontext() if rounded else unrounded(self._runs):
                return interface(self._runs, tokens)

        return run

    def too_large(self) -> str | None:
        return None
