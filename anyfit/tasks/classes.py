"""How far a picture's predicted classes are from the original's."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PretrainedConfig, PreTrainedModel

from anyfit.core.errors import ModelError
from anyfit.tasks import base
from anyfit.tasks.base import KEPT_BYTES, Outputs, Task, outputs_of

_PICTURES_AT_ONCE = 32


@dataclass(frozen=True)
class Quality(base.Divergences):
    """Figures over `num_segments` held-out pictures, of each of which the class is predicted."""

    task, per, answer = "classes", "picture", "class"
    about = "mean KL divergence of a picture's class, nats"


@dataclass(frozen=True)
class Reference(base.Reference):
    """What the original makes of `segments`: `log_probs`, (pictures, classes) float32."""

    segments: Tensor
    quality: Quality
    log_probs: Tensor = field(repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel | Outputs, segments: Tensor) -> Reference:
        log_probs = predicted(model, segments)
        return cls(segments, _quality(log_probs, log_probs), log_probs)

    def measured(self, outputs: PreTrainedModel | Outputs) -> Quality:
        return _quality(self.log_probs, predicted(outputs, self.segments))

    def loss(self, outputs: PreTrainedModel | Outputs) -> float:
        return float(_divergences(self.log_probs, predicted(outputs, self.segments)).mean())


@torch.inference_mode()
def predicted(model: PreTrainedModel | Outputs, segments: Tensor) -> Tensor:
    """Log-probabilities of each picture's classes, (pictures, classes) float32. Raises `ModelError` for any that aren't finite."""
    run = outputs_of(model)
    found = torch.cat([run(part).float().log_softmax(-1).cpu() for part in segments.split(_PICTURES_AT_ONCE)])
    if not found.isfinite().all():
        raise ModelError(
            "The model's predictions are not finite: its weights overflow in float32.",
            remedy="Check the original: download it again, or run it by itself.",
        )
    return found


def _divergences(expected: Tensor, log_probs: Tensor) -> Tensor:
    """KL of each picture, (pictures,) float64; rounding below zero is no divergence."""
    return (expected.double().exp() * (expected.double() - log_probs.double())).sum(-1).clamp_min(0)


def _quality(expected: Tensor, log_probs: Tensor) -> Quality:
    found, same = _divergences(expected, log_probs), (expected.argmax(-1) == log_probs.argmax(-1)).double()
    median, p99 = np.quantile(found.numpy(), [0.5, 0.99]).tolist()
    errors = [float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan for values in (found, same)]
    return Quality(len(found), len(found), float(found.mean()), errors[0], median, p99, float(same.mean()), errors[1])


class Classes(Task):
    quality = Quality

    def reference(self, outputs: PreTrainedModel | Outputs, segments: Tensor, *, kept_bytes: int = KEPT_BYTES) -> Reference:
        """Predictions of classes are small: they are always remembered."""
        return Reference.of(outputs, segments)

    def memory(self, num_tokens: int, config: PretrainedConfig) -> int:
        return 8 * config.num_labels * num_tokens

    def num_answers(self, segments: Tensor) -> int:
        return len(segments)

    def pull(self, run: Outputs, hidden: Tensor, segment: Tensor, seed: int) -> Tensor:
        """Of the log-likelihood of a class drawn from the network's own distribution."""
        hidden = hidden.clone().requires_grad_()
        logits = run(hidden).float()
        labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=torch.Generator().manual_seed(seed))[:, 0]
        cross_entropy(logits, labels.to(logits.device), reduction="sum").backward()
        assert hidden.grad is not None
        return hidden.grad


TASK = Classes()
