"""Perplexity, divergence and agreement against a plain computation in double precision."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from anyfit.core.errors import ModelError
from anyfit.tasks import language
from anyfit.tasks.language import Quality, Reference, kl, measure
from anyfit.testing.models import tiny_model

SEGMENTS, LENGTH, VOCABULARY = 12, 24, 512


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (SEGMENTS, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def original() -> PreTrainedModel:
    return tiny_model("llama", seed=1)


@pytest.fixture(scope="module")
def other() -> PreTrainedModel:
    """The original, slightly disturbed."""
    model = tiny_model("llama", seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return model


def plainly(original: PreTrainedModel, other: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, divergences, agreements), each (segments, length - 1), one segment at a time in float64."""
    rows = []
    with torch.no_grad():
        for row in tokens:
            p, q = (torch.log_softmax(m(row[None]).logits[0, :-1].double(), -1) for m in (original, other))
            losses = -torch.stack([q[at, row[at + 1]] for at in range(len(row) - 1)])
            divergences = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)
            rows.append((losses, divergences, (p.argmax(-1) == q.argmax(-1)).double()))
    losses, divergences, agreements = (torch.stack(part) for part in zip(*rows, strict=True))
    return losses, divergences, agreements


def bootstrap(values: Tensor, draws: int = 4000) -> Tensor:
    """Means of segments drawn again with replacement."""
    means = values.mean(1)
    return means[torch.randint(len(means), (draws, len(means)), generator=torch.Generator().manual_seed(3))].mean(1)


@pytest.mark.usefixtures("same_random_state")
def test_equals_the_plain_computation(original: PreTrainedModel, other: PreTrainedModel, tokens: Tensor) -> None:
    losses, divergences, agreements = plainly(original, other, tokens)
    quality = measure(other, Reference.of(original, tokens))
    assert quality.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert quality.kl_mean == pytest.approx(float(divergences.mean()), rel=1e-4)
    assert quality.kl_median == pytest.approx(float(divergences.quantile(0.5)), rel=1e-3)
    assert quality.kl_p99 == pytest.approx(float(divergences.quantile(0.99)), rel=1e-3)
    assert quality.top1 == pytest.approx(float(agreements.mean()))
    assert (quality.num_segments, quality.num_tokens) == (SEGMENTS, SEGMENTS * (LENGTH - 1))
    assert 0 < quality.kl_median < quality.kl_mean < quality.kl_p99
    assert 0 < quality.top1 < 1


def test_standard_errors_are_those_of_a_bootstrap(original: PreTrainedModel, other: PreTrainedModel, tokens: Tensor) -> None:
    losses, divergences, agreements = plainly(original, other, tokens)
    quality = measure(other, Reference.of(original, tokens))
    # A bootstrap of n segments is smaller by sqrt((n - 1) / n).
    factor = math.sqrt(SEGMENTS / (SEGMENTS - 1))
    assert quality.perplexity_stderr == pytest.approx(factor * float(bootstrap(losses).exp().std()), rel=0.1)
    assert quality.kl_stderr == pytest.approx(factor * float(bootstrap(divergences).std()), rel=0.1)
    assert quality.top1_stderr == pytest.approx(factor * float(bootstrap(agreements).std()), rel=0.1)


def test_the_original_is_no_distance_from_itself(original: PreTrainedModel, tokens: Tensor) -> None:
    reference = Reference.of(original, tokens, batch_size=5)
    quality = measure(original, reference)
    assert quality == reference.quality
    assert (quality.kl_mean, quality.kl_p99, quality.kl_stderr, quality.top1) == (0.0, 0.0, 0.0, 1.0)
    assert kl(original, reference) == 0.0


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_batch_does_not_matter(original: PreTrainedModel, other: PreTrainedModel, tokens: Tensor, batch_size: int) -> None:
    reference = Reference.of(original, tokens)
    quality = measure(other, reference, batch_size=batch_size)
    assert quality.kl_mean == pytest.approx(measure(other, reference).kl_mean, rel=1e-5)
    assert kl(other, reference, batch_size=batch_size) == pytest.approx(quality.kl_mean, rel=1e-12)


def test_chunks_of_positions_do_not_matter(
    original: PreTrainedModel, other: PreTrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = measure(other, Reference.of(original, tokens))
    monkeypatch.setattr(language, "_CHUNK_BYTES", 7 * 4 * VOCABULARY)
    assert measure(other, Reference.of(original, tokens)) == expected


def test_a_reference_too_large_to_keep_runs_again(original: PreTrainedModel, other: PreTrainedModel, tokens: Tensor) -> None:
    kept = Reference.of(original, tokens)
    size = 4 * VOCABULARY * SEGMENTS * (LENGTH - 1)
    assert Reference.of(original, tokens, kept_bytes=size).log_probs is not None
    recomputed = Reference.of(original, tokens, kept_bytes=size - 1)
    assert recomputed.log_probs is None
    assert recomputed.quality == kept.quality
    assert measure(other, recomputed) == measure(other, kept)
    assert kl(tiny_model("llama", seed=1), recomputed) == 0.0
    with pytest.raises(AssertionError):
        kl(original, recomputed)


def test_the_batch_shrinks_for_a_large_vocabulary(original: PreTrainedModel, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language, "_BATCH_BYTES", 3 * 4 * VOCABULARY * LENGTH)
    assert Reference.of(original, tokens).batch_size == 3
    monkeypatch.setattr(language, "_BATCH_BYTES", 1)
    assert Reference.of(original, tokens).batch_size == 1


def test_any_source_of_logits_will_do(original: PreTrainedModel, other: PreTrainedModel, tokens: Tensor) -> None:
    def logits(batch: Tensor) -> Tensor:
        with torch.no_grad():
            return other(batch).logits

    reference = Reference.of(original, tokens)
    assert measure(logits, reference) == measure(other, reference)
    assert measure(original, Reference.of(logits, tokens)).kl_mean > 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_predictions_that_are_not_finite_are_refused(original: PreTrainedModel, tokens: Tensor, value: float) -> None:
    def broken(batch: Tensor) -> Tensor:
        return torch.full((*batch.shape, VOCABULARY), value)

    reference = Reference.of(original, tokens)
    for measured in (lambda: measure(broken, reference), lambda: kl(broken, reference), lambda: Reference.of(broken, tokens)):
        with pytest.raises(ModelError, match="not finite"):
            measured()


def test_one_segment_has_no_standard_error(original: PreTrainedModel, tokens: Tensor) -> None:
    quality = Reference.of(original, tokens[:1]).quality
    assert math.isnan(quality.perplexity_stderr)
    assert quality.to_json()["perplexity_stderr"] is None
    assert math.isnan(Quality.from_json(quality.to_json()).kl_stderr)


def test_json(original: PreTrainedModel, other: PreTrainedModel, tokens: Tensor) -> None:
    quality = measure(other, Reference.of(original, tokens))
    assert Quality.from_json(json.loads(json.dumps(quality.to_json(), allow_nan=False))) == quality
