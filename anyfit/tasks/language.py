"""How well a model predicts text, and how far its predictions are from the original's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div
from transformers import PretrainedConfig, PreTrainedModel

from anyfit.core.errors import ModelError
from anyfit.tasks import base
from anyfit.tasks.base import KEPT_BYTES, Figure, Outputs, Task, outputs_of, plus_minus

Logits = Callable[[Tensor], Tensor]
"""Tokens (segments, length) int64 to the logits of each next token, (segments, length, vocabulary)."""

POSITIONS_AT_ONCE = 256
"""Predictions that are made together where all their logits are needed at once."""
_BATCH_BYTES = 1 << 27
_CHUNK_BYTES = 1 << 25


@dataclass(frozen=True)
class Quality(base.Divergences):
    """Figures over `num_tokens` predictions in `num_segments` segments of held-out text."""

    perplexity: float
    perplexity_stderr: float

    task, per, answer = "language", "token", "token"
    about = "mean KL divergence of the next token, nats"

    @property
    def own(self) -> tuple[str, str]:
        return "perplexity", f"{self.perplexity:.2f}"

    def figures(self, original: base.Quality) -> list[Figure]:
        assert isinstance(original, Quality)
        both = (plus_minus(quality.perplexity, quality.perplexity_stderr) for quality in (original, self))
        return [Figure("perplexity", *both), *super().figures(original)]


@dataclass(frozen=True)
class Reference(base.Reference):
    """What the original predicts on `tokens`, (segments, length) int64.

    `log_probs`, (segments, length - 1, vocabulary) float32, are None where they would take too much memory: then
    `logits` is asked again at each measurement, so the original must stay as it is.
    """

    tokens: Tensor
    batch_size: int
    quality: Quality
    """The original against itself: its own perplexity, no divergence."""
    log_probs: Tensor | None = field(repr=False)
    logits: Logits = field(repr=False)
    original: nn.Module | None = field(repr=False)

    @classmethod
    def of(cls, model: PreTrainedModel | Outputs, tokens: Tensor, batch_size: int = 8, *, kept_bytes: int = KEPT_BYTES) -> Reference:
        """Run the original over the text once. `batch_size` is lowered where the vocabulary is large."""
        logits = outputs_of(model)
        with torch.no_grad():
            vocabulary = logits(tokens[:1]).shape[-1]
            batch_size = max(1, min(batch_size, _BATCH_BYTES // (4 * vocabulary * tokens.shape[1])))
            num_predictions = tokens.shape[0] * (tokens.shape[1] - 1)
            kept = torch.empty(num_predictions, vocabulary) if 4 * vocabulary * num_predictions <= kept_bytes else None
            losses = torch.empty(num_predictions, dtype=torch.float64)
            for rows, log_probs in _predictions(logits, tokens, batch_size):
                losses[rows] = _losses(log_probs, tokens, rows)
                if kept is not None:
                    kept[rows] = log_probs.cpu()
        nothing = torch.zeros(num_predictions, dtype=torch.float64)
        return cls(
            tokens=tokens,
            batch_size=batch_size,
            quality=_quality(losses, nothing, nothing + 1, tokens.shape[0]),
            log_probs=kept.reshape(tokens.shape[0], -1, vocabulary) if kept is not None else None,
            logits=logits,
            original=model if isinstance(model, nn.Module) else None,
        )

    def measured(self, outputs: PreTrainedModel | Outputs) -> Quality:
        return measure(outputs, self)

    def loss(self, outputs: PreTrainedModel | Outputs) -> float:
        return kl(outputs, self)

    def expected(self, segments: Tensor) -> Tensor:
        """The original's log-probabilities for these `segments` (n,) of the tokens, (n, length - 1, vocabulary) float32."""
        if self.log_probs is not None:
            return self.log_probs[segments]
        with torch.no_grad():
            return self.logits(self.tokens[segments])[:, :-1].float().log_softmax(-1)

    def divergence(self, logits: Tensor, segments: Tensor) -> Tensor:
        """Mean KL per token in nats of `logits` (n, length, vocabulary) for these segments, to be differentiated."""
        expected, log_probs = self.expected(segments).to(logits.device), logits[:, :-1].float().log_softmax(-1)
        return kl_div(log_probs, expected, log_target=True, reduction="sum") / expected[..., 0].numel()


def measure(model: PreTrainedModel | Outputs, reference: Reference, *, batch_size: int | None = None) -> Quality:
    """Every figure for a model on the reference's text. The same model gives a divergence of exactly zero.

    Raises `ModelError` for predictions that are not finite.
    """
    num_predictions = reference.tokens.shape[0] * (reference.tokens.shape[1] - 1)
    losses, divergences, agreements = (torch.empty(num_predictions, dtype=torch.float64) for _ in range(3))
    with torch.no_grad():
        for rows, expected, log_probs in _pairs(model, reference, batch_size):
            losses[rows] = _losses(log_probs, reference.tokens, rows)
            divergences[rows] = _divergences(expected, log_probs)
            agreements[rows] = (expected.argmax(-1) == log_probs.argmax(-1)).double().cpu()
    return _quality(losses, divergences, agreements, reference.tokens.shape[0])


def kl(model: PreTrainedModel | Outputs, reference: Reference, *, batch_size: int | None = None) -> float:
    """Mean KL(original || model) per token in nats: `measure(...).kl_mean` without the rest. Raises as `measure` does."""
    total, count = 0.0, 0
    with torch.no_grad():
        for _, expected, log_probs in _pairs(model, reference, batch_size):
            total += float(_divergences(expected, log_probs).sum())
            count += len(expected)
    if not math.isfinite(total):
        raise _not_finite()
    return total / count


def _predictions(logits: Logits, tokens: Tensor, batch_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Chunks of log-probabilities, (predictions, vocabulary) float32, with their place among all predictions."""
    per_segment = tokens.shape[1] - 1
    for start in range(0, tokens.shape[0], batch_size):
        batch = logits(tokens[start : start + batch_size])[:, :-1].flatten(0, 1)
        step = max(1, _CHUNK_BYTES // (4 * batch.shape[1]))
        for at in range(0, len(batch), step):
            chunk = torch.log_softmax(batch[at : at + step].float(), dim=-1)
            first = start * per_segment + at
            yield slice(first, first + len(chunk)), chunk


def _pairs(model: PreTrainedModel | Outputs, reference: Reference, batch_size: int | None) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(place, original's log-probabilities, model's), chunk by chunk."""
    predicted = _predictions(outputs_of(model), reference.tokens, batch_size or reference.batch_size)
    if reference.log_probs is not None:
        flat = reference.log_probs.flatten(0, 1)
        yield from ((rows, flat[rows].to(chunk.device), chunk) for rows, chunk in predicted)
        return
    assert model is not reference.original, "a reference that isn't kept needs an original that is not the model measured"
    expected = _predictions(reference.logits, reference.tokens, batch_size or reference.batch_size)
    for (rows, chunk), (_, original) in zip(predicted, expected, strict=True):
        yield rows, original.to(chunk.device), chunk


def _losses(log_probs: Tensor, tokens: Tensor, rows: slice) -> Tensor:
    """Of the tokens that came, (predictions,) float64, in nats."""
    targets = tokens[:, 1:].flatten()[rows].to(log_probs.device)
    return -log_probs.gather(-1, targets[:, None])[:, 0].double().cpu()


def _divergences(expected: Tensor, log_probs: Tensor) -> Tensor:
    """KL of each prediction, (predictions,) float64; rounding below zero is no divergence."""
    return (expected.exp() * (expected - log_probs)).sum(-1, dtype=torch.float64).clamp_min(0).cpu()


def _quality(losses: Tensor, divergences: Tensor, agreements: Tensor, num_segments: int) -> Quality:
    """Figures from one number per prediction. Segments are equally long, so their means average to the mean."""
    if not (losses.isfinite().all() and divergences.isfinite().all()):
        raise _not_finite()
    perplexity = math.exp(losses.mean())
    median, p99 = np.quantile(divergences.numpy(), [0.5, 0.99]).tolist()
    return Quality(
        perplexity=perplexity,
        perplexity_stderr=perplexity * _stderr(losses, num_segments),
        kl_mean=float(divergences.mean()),
        kl_stderr=_stderr(divergences, num_segments),
        kl_median=median,
        kl_p99=p99,
        top1=float(agreements.mean()),
        top1_stderr=_stderr(agreements, num_segments),
        num_tokens=len(losses),
        num_segments=num_segments,
    )


def _not_finite() -> ModelError:
    return ModelError(
        "The model's predictions are not finite: its weights overflow in float32, or the text has tokens that it gives no chance.",
        remedy="Check the original: download it again, or measure it by itself.",
    )


def _stderr(values: Tensor, num_segments: int) -> float:
    """Of the mean, over segments: tokens of one segment are not independent."""
    if num_segments < 2:
        return math.nan
    return float(values.reshape(num_segments, -1).mean(1).std()) / math.sqrt(num_segments)


class Language(Task):
    quality = Quality

    def reference(self, outputs: PreTrainedModel | Outputs, segments: Tensor, *, kept_bytes: int = KEPT_BYTES) -> Reference:
        return Reference.of(outputs, segments, kept_bytes=kept_bytes)

    def memory(self, num_tokens: int, config: PretrainedConfig) -> int:
        """Its distributions, or one batch of them."""
        whole = 4 * num_tokens * config.vocab_size
        return whole if whole <= KEPT_BYTES else _BATCH_BYTES

    def num_answers(self, segments: Tensor) -> int:
        return segments[:, 1:].numel()

    def pull(self, run: Outputs, hidden: Tensor, segment: Tensor, seed: int) -> Tensor:
        """Of the log-likelihood of labels drawn from the network's own distribution: the KL has the curvature of the Fisher information."""
        generator, parts = torch.Generator().manual_seed(seed), []
        for some in hidden[:, :-1].split(POSITIONS_AT_ONCE, 1):
            some = some.clone().requires_grad_()
            logits = run(some)[0].float()
            labels = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            cross_entropy(logits, labels.to(logits.device), reduction="sum").backward()
            assert some.grad is not None
            parts.append(some.grad)
        return torch.cat([*parts, torch.zeros_like(hidden[:, -1:])], 1)


TASK = Language()
