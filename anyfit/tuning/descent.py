"""What every tuning by gradients does: steps over text, against the gradients of what is tuned in the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Generator, Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from anyfit.devices import repeatable
from anyfit.progress import Progress
from anyfit.tasks.language import Logits, Reference
from anyfit.tuning.coded import Coded, Summed


@dataclass(frozen=True)
class Tuned:
    """The tuned matrices by name, and mean KL to the original per held-out token in nats, as given and as tuned."""

    coded: Mapping[str, Coded | Summed]
    before: float
    after: float


class Movable(Protocol):
    """Some matrices of the network, and how they move."""

    def parameters(self) -> dict[str, Tensor]:
        """Their values as they are now, as the network's parameters."""

    def move(self, gradients: Mapping[str, Tensor], remaining: float) -> None:
        """One step against the gradients of the network's parameters; `remaining` of the way is ahead, from 1 to 0."""


class Schedule(Protocol):
    """The part of a method's settings that says how long it goes on: so many steps, each on so many segments of text."""

    @property
    def num_steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def seed(self) -> int: ...


def descend(
    network: PreTrainedModel,
    movables: Sequence[Movable],
    reference: Reference,
    schedule: Schedule,
    progress: Progress,
    told: Callable[[], str] = str,
) -> None:
    """Move what is tuned towards the original's predictions. The network is never changed. `told`: more about each step."""
    batches = _batches(len(reference.tokens), schedule.batch_size, Generator().manual_seed(schedule.seed))
    with repeatable(network.device), progress.stage("tune", schedule.num_steps) as stage:
        for step, batch in zip(range(schedule.num_steps), batches, strict=False):
            values = {name: value.requires_grad_() for name, value in _values(movables).items()}
            loss = reference.divergence(logits(network, values)(reference.tokens[batch]), batch)
            gradients = dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))
            for movable in movables:
                movable.move(gradients, 1 - step / schedule.num_steps)
            stage.advance(detail=f"KL {float(loss.detach()):.4f}{told()}")


def logits(network: PreTrainedModel, values: Mapping[str, Tensor]) -> Logits:
    """The network with these values of its parameters."""
    return lambda tokens: functional_call(network, dict(values), kwargs={"input_ids": tokens.to(network.device), "use_cache": False}).logits


def running(network: PreTrainedModel, movables: Iterable[Movable]) -> Logits:
    """The network with what is tuned as it is now."""
    return logits(network, _values(movables))


def _values(movables: Iterable[Movable]) -> dict[str, Tensor]:
    return {name: value for movable in movables for name, value in movable.parameters().items()}


def _batches(num_segments: int, batch_size: int, generator: Generator) -> Iterator[Tensor]:
    """Indices of segments, for ever: each once before any comes again."""
    while True:
        yield from torch.randperm(num_segments, generator=generator).split(batch_size)
