"""What training brings down: towards what a step's predictions are moved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from anyfit.tasks.language import Reference


@dataclass(frozen=True)
class MicroBatch:
    """What one pass of a step reads: windows of text, or pictures, by their numbers, (samples,) int64."""

    step: int
    samples: Tensor


class Objective(ABC):
    """What a network is trained for. `num_samples` that there are to read."""

    num_samples: int

    @abstractmethod
    def logits(self, batch: MicroBatch) -> Tensor:
        """Of the network as it is now, (samples, ..., classes)."""

    @abstractmethod
    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        """A mean over the batch."""


class Divergence(Objective):
    """Mean KL per token in nats to the original's predictions on the text of `reference`."""

    def __init__(self, model: PreTrainedModel, reference: Reference) -> None:
        self._model, self._reference, self.num_samples = model, reference, len(reference.tokens)

    def logits(self, batch: MicroBatch) -> Tensor:
        with _autocast(self._model.device):
            tokens = self._reference.tokens[batch.samples].to(self._model.device)
            found: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return found

    def loss(self, logits: Tensor, batch: MicroBatch) -> Tensor:
        return self._reference.divergence(logits, batch.samples)


def distilled(logits: Tensor, teacher: Tensor) -> Tensor:
    """Mean KL per prediction in nats to those of another config of the same network: in-place distillation, arXiv 1903.05134.

    `teacher`: its logits, through which nothing is learnt.
    """
    expected = teacher.detach().float().log_softmax(-1)
    return kl_div(logits.float().log_softmax(-1), expected, log_target=True, reduction="sum") / expected[..., 0].numel()


def _autocast(where: torch.device) -> AbstractContextManager[Any]:
    """Products in bfloat16 where the device has them."""
    fast = where.type != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16")
    return torch.autocast(where.type, torch.bfloat16) if fast else nullcontext()
