"""What training brings down: towards what a step's predictions are moved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div
from transformers import PreTrainedModel

from anyfit.interface import interface_of, present
from anyfit.tasks.language import Reference


@dataclass(frozen=True)
class MicroBatch:
    """What one pass of a step reads: windows of text, or pictures, by their numbers, (samples,) int64."""

    step: int
    samples: Tensor


@dataclass(frozen=True)
class Outputs:
    """What a network makes of a batch. `logits` (samples, ..., classes); None of a network without. `states` of tokens, (samples, length,
    width) each: what enters the first block, and what leaves every block, the last one's as the final norm leaves it; empty where no
    loss asks for them."""

    logits: Tensor | None = None
    states: tuple[Tensor, ...] = ()


class Objective(ABC):
    """What a network is trained for. `num_samples` that there are to read."""

    num_samples: int

    @abstractmethod
    def outputs(self, batch: MicroBatch) -> Outputs:
        """Of the network as it is now."""

    @abstractmethod
    def loss(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        """A mean over the batch."""


class Divergence(Objective):
    """Mean KL per token in nats to the original's predictions on the text of `reference`."""

    def __init__(self, model: PreTrainedModel, reference: Reference) -> None:
        self._model, self._reference, self.num_samples = model, reference, len(reference.tokens)

    def outputs(self, batch: MicroBatch) -> Outputs:
        return _predicted(self._model, self._reference.tokens[batch.samples])

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        assert outputs.logits is not None, "a language model predicts"
        return self._reference.divergence(outputs.logits, batch.samples)


class NextTokens(Objective):
    """The task's own loss: mean cross-entropy per token in nats of the text itself."""

    def __init__(self, model: PreTrainedModel, reference: Reference) -> None:
        self._model, self._tokens, self.num_samples = model, reference.tokens, len(reference.tokens)

    def outputs(self, batch: MicroBatch) -> Outputs:
        return _predicted(self._model, self._tokens[batch.samples])

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        assert outputs.logits is not None, "a language model predicts"
        expected = self._tokens[batch.samples, 1:].to(outputs.logits.device)
        return cross_entropy(outputs.logits[:, :-1].float().flatten(0, 1), expected.flatten())


ORIGINAL, TASK = "original", "task"
TOWARDS: Mapping[str, type[Divergence] | type[NextTokens]] = {ORIGINAL: Divergence, TASK: NextTokens}
"""What a language model can be trained towards: what the original predicts, or the text."""


class TokenDistance(Objective):
    """How far the states of tokens are from the original's, after every block: the token-level distillation of ZipLM, arXiv 2302.04089,
    where no projection is needed, as pruning leaves the width of the states alone.

    L_token is the mean over tokens that aren't padding, and over layers, of |h - h'|². Differs from the paper in that each layer's is
    divided by the mean of |h'|², because states grow from block to block, and from network to network: so one weight beside another
    loss serves all. Works with any network that gives its states, an encoder without predictions too.

    `segments`: as the network's `Interface` reads them.
    """

    def __init__(self, model: PreTrainedModel, original: PreTrainedModel, segments: Tensor) -> None:
        self._model, self._original, self._segments, self.num_samples = model, original, segments, len(segments)
        self._interface = interface_of(model.config)

    def outputs(self, batch: MicroBatch) -> Outputs:
        return self._run(self._model, batch)

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        with torch.no_grad():
            expected = self._run(self._original, batch).states
        mask = present(self._segments[batch.samples]) if self._interface.words else None
        return token_distance(outputs.states, expected, mask)

    def _run(self, model: PreTrainedModel, batch: MicroBatch) -> Outputs:
        given = self._interface.tensors(self._segments[batch.samples].to(model.device))
        with _autocast(model.device):
            found = model(**given, output_hidden_states=True)
        return Outputs(getattr(found, "logits", None), tuple(found.hidden_states))


class Both(Objective):
    """The divergence of the predictions, and `share` of the distance of the tokens' states, on the same text."""

    def __init__(self, divergence: Divergence, states: TokenDistance, share: float) -> None:
        assert divergence.num_samples == states.num_samples, "both read the same text"
        self._divergence, self._states, self._share, self.num_samples = divergence, states, share, states.num_samples

    def outputs(self, batch: MicroBatch) -> Outputs:
        return self._states.outputs(batch)

    def loss(self, outputs: Outputs, batch: MicroBatch) -> Tensor:
        return self._divergence.loss(outputs, batch) + self._share * self._states.loss(outputs, batch)


def token_distance(states: Sequence[Tensor], expected: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """See `TokenDistance`: of the `states` of a network, (samples, length, width) each, and of those that are `expected`."""
    assert len(states) == len(expected) > 0, f"{len(states)} states where {len(expected)} are expected"
    layers = []
    for own, other in zip(states, expected, strict=True):
        squares, norms = (own.float() - other.float()).square().sum(-1), other.float().square().sum(-1)
        if mask is not None:
            counted = mask.to(squares.device)
            squares, norms = squares * counted, norms * counted
        layers.append(squares.sum() / norms.sum())
    return torch.stack(layers).mean()


def distilled(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL per prediction in nats to those of another config of the same network: in-place distillation, arXiv 1903.05134.

    `teacher`: its logits, through which nothing is learnt.
    """
    expected = teacher.detach().float().log_softmax(-1)
    return kl_div(logits.float().log_softmax(-1), expected, log_target=True, reduction="sum") / expected[..., 0].numel()


def _predicted(model: PreTrainedModel, tokens: Tensor) -> Outputs:
    with _autocast(model.device):
        return Outputs(model(input_ids=tokens.to(model.device), use_cache=False).logits)


def _autocast(where: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 where the device has them."""
    fast = where.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.autocast(where.type, torch.bfloat16) if fast else nullcontext()
