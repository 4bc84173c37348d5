"""How far an encoder's embeddings are from the original's.

An embedding is the mean of the last hidden states over a text's own tokens, not its padding, and its length says nothing: the loss is
one less the cosine of the angle to the original's, which is half the squared distance of the two at length one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PretrainedConfig, PreTrainedModel

from anyfit.core.errors import ModelError
from anyfit.interface import present
from anyfit.tasks import base
from anyfit.tasks.base import KEPT_BYTES, Figure, Outputs, Task, outputs_of, plus_minus

_BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Quality(base.Quality):
    """Figures over `num_segments` held-out texts of `num_tokens` in all: one less the cosine of each text's embedding and the original's.
    The standard error is over texts."""

    distance_mean: float
    distance_stderr: float
    distance_median: float
    distance_p99: float

    task = "embedding"
    distance = "1 - cosine"
    about = "mean of one less the cosine of a text's embedding and the original's"

    @property
    def loss(self) -> float:
        return self.distance_mean

    @property
    def loss_stderr(self) -> float:
        return self.distance_stderr

    @property
    def own(self) -> None:
        return None

    @property
    def cosine(self) -> float:
        return 1 - self.distance_mean

    def columns(self) -> dict[str, str]:
        return {self.distance: plus_minus(self.distance_mean, self.distance_stderr), "99th percentile": f"{self.distance_p99:.3g}"}

    def figures(self, original: base.Quality) -> list[Figure]:
        return [
            Figure("cosine with the original's embedding, mean", "1", plus_minus(self.cosine, self.distance_stderr)),
            Figure(f"{self.distance}, mean", "0", plus_minus(self.distance_mean, self.distance_stderr)),
            Figure(f"{self.distance}, median", "0", f"{self.distance_median:.3g}"),
            Figure(f"{self.distance}, 99th percentile", "0", f"{self.distance_p99:.3g}"),
        ]


@dataclass(frozen=True)
class Reference(base.Reference):
    """What the original makes of `segments`, (texts, length) int64 with padding: `embeddings`, (texts, hidden) float32."""

    segments: Tensor
    quality: Quality
    embeddings: Tensor = field(repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel | Outputs, segments: Tensor) -> Reference:
        embeddings = embedded(model, segments)
        return cls(segments, _quality(torch.zeros(len(segments), dtype=torch.float64), segments), embeddings)

    def measured(self, outputs: PreTrainedModel | Outputs) -> Quality:
        return _quality(self._distances(outputs), self.segments)

    def loss(self, outputs: PreTrainedModel | Outputs) -> float:
        return float(self._distances(outputs).mean())

    def _distances(self, outputs: PreTrainedModel | Outputs) -> Tensor:
        return distances(embedded(outputs, self.segments), self.embeddings)


def pooled(hidden: Tensor, segments: Tensor) -> Tensor:
    """Hidden states (texts, length, hidden) to embeddings (texts, hidden), of any length."""
    mask = present(segments).to(hidden.device, hidden.dtype)[..., None]
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.inference_mode()
def embedded(model: PreTrainedModel | Outputs, segments: Tensor) -> Tensor:
    """Embeddings of texts, (texts, hidden) float32. Raises `ModelError` for any that aren't finite."""
    run = outputs_of(model)
    parts = segments.split(max(1, _BATCH_TOKENS // segments.shape[1]))
    found = torch.cat([pooled(run(part).float(), part).cpu() for part in parts])
    if not found.isfinite().all():
        raise ModelError(
            "The model's outputs are not finite: its weights overflow in float32.",
            remedy="Check the original: download it again, or run it by itself.",
        )
    return found


def distances(embeddings: Tensor, others: Tensor) -> Tensor:
    """One less the cosine, row by row, float64. By the distance of what has length one: so that equal embeddings are at none."""
    return 0.5 * (normalize(embeddings.double(), dim=-1) - normalize(others.double(), dim=-1)).square().sum(-1)


def _quality(found: Tensor, segments: Tensor) -> Quality:
    median, p99 = np.quantile(found.numpy(), [0.5, 0.99]).tolist()
    stderr = float(found.std()) / math.sqrt(len(found)) if len(found) > 1 else math.nan
    return Quality(int(present(segments).sum()), len(segments), float(found.mean()), stderr, median, p99)


class Embedding(Task):
    quality = Quality

    def reference(self, outputs: PreTrainedModel | Outputs, segments: Tensor, *, kept_bytes: int = KEPT_BYTES) -> Reference:
        """Embeddings are small: they are always remembered."""
        return Reference.of(outputs, segments)

    def memory(self, num_tokens: int, config: PretrainedConfig) -> int:
        return 4 * config.hidden_size * max(_BATCH_TOKENS, num_tokens)

    def num_answers(self, segments: Tensor) -> int:
        return len(segments)

    def pull(self, run: Outputs, hidden: Tensor, segment: Tensor, seed: int) -> Tensor:
        """Of the embedding at length one, along a random direction: half its squared distance has the curvature JᵀJ."""
        hidden = hidden.clone().requires_grad_()
        embedding = normalize(pooled(run(hidden).float(), segment), dim=-1)
        direction = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(seed))
        (embedding * direction.to(embedding.device)).sum().backward()
        assert hidden.grad is not None
        return hidden.grad


TASK = Embedding()
