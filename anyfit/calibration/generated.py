"""Text that the model writes itself, for those who have none.

Sampled from the model's own predictions (LLM-QAT, arXiv 2305.17888, section 3.1), so that it is calibrated with what it
was trained on. Tokens are taken as they are sampled, never through a text and back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from anyfit.calibration.data import PURPOSES, Pending, Segments, adds_bos
from anyfit.core.errors import DataError
from anyfit.progress import Progress, Stage

SELF = "self"
"""The name under which the model's own text is asked for."""
LENGTH = 256
"""Tokens in a segment, unless asked otherwise: what a small model writes wanders off in the long run."""
TOP_P = 0.95
"""Of each prediction, the likeliest tokens that together have this probability, but not more than `_MOST_TOKENS`: a full
sort of a large vocabulary would take longer than the prediction."""
_MOST_TOKENS = 1024
_CACHE_BYTES = 1 << 30
"""What the keys and values of the segments that are written side by side may take."""
_MOST_AT_ONCE = 64
READINGS = 4
"""Writing a token takes as long as reading so many at once."""


@dataclass(frozen=True)
class Habits:
    """What a tokenizer says of text. `start`: the token before any, if there is one. `restart`: whether it also follows
    each `end` but itself. `num_tokens`: higher ids are padding of the embedding, and never written."""

    start: int | None
    end: int | None
    restart: bool
    num_tokens: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Habits:
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        return cls(
            start, tokenizer.eos_token_id, adds_bos(tokenizer) and start != tokenizer.eos_token_id, 1 + max(tokenizer.get_vocab().values())
        )


def generated(
    model: Callable[[], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    counts: Mapping[str, int],
    *,
    length: int,
    seed: int,
    progress: Progress,
) -> Segments:
    """Segments of `length` tokens, `counts` by purpose, each purpose from a seed of its own.

    They are written when they are first asked for, by the network that `model` returns: whoever only wants to know how
    many there are doesn't wait. Asking raises `DataError` for a model that predicts nothing finite.
    """
    habits = Habits.of(tokenizer)

    def make(purpose: str) -> Tensor:
        state = np.random.SeedSequence((seed, PURPOSES.index(purpose))).generate_state(1)
        rng = torch.Generator().manual_seed(int(state[0]))
        with progress.stage(f"write text for {purpose}", counts[purpose] * length) as stage:
            return write(model(), habits, (counts[purpose], length), rng, stage)

    pending = {purpose: Pending((counts[purpose], length), partial(make, purpose)) for purpose in PURPOSES}
    listed = " + ".join(str(counts[purpose]) for purpose in PURPOSES)
    note = (
        f"the model is calibrated and measured on text that it writes itself, {listed} segments of {length} tokens: "
        "text like that which it will meet is better (--data)"
    )
    return Segments(**pending, description=f"text that the model wrote itself (seed {seed})", notes=(note,))


@torch.inference_mode()
def write(model: PreTrainedModel, habits: Habits, shape: tuple[int, int], rng: torch.Generator, stage: Stage) -> Tensor:
    """Sampled text, (segments, length) int64, at temperature 1."""
    num_segments, length = shape
    at_once = max(1, min(_MOST_AT_ONCE, _CACHE_BYTES // _cache_bytes(model.config, length)))
    batches = []
    while num_segments:
        starts = _starts(model, habits, min(at_once, num_segments), rng)
        batches.append(_continued(model, habits, starts, length, rng, stage))
        num_segments -= len(starts)
    return torch.cat(batches)


def memory(config: PretrainedConfig, length: int) -> int:
    """Bytes that writing takes at most besides the model."""
    return max(_CACHE_BYTES, _cache_bytes(config, length))


def _cache_bytes(config: PretrainedConfig, length: int) -> int:
    """Keys and values of one segment, in float32."""
    heads = int(config.num_attention_heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    stored = int(getattr(config, "num_key_value_heads", None) or heads)
    return 2 * 4 * int(config.num_hidden_layers) * stored * width * length


def _continued(model: PreTrainedModel, habits: Habits, starts: Tensor, length: int, rng: torch.Generator, stage: Stage) -> Tensor:
    """(segments, length) int64 from `starts` (segments,), side by side."""
    tokens = starts[:, None]
    cache = None
    stage.advance(len(starts))
    while tokens.shape[1] < length:
        # A network without a cache of its own reads everything again.
        read = tokens[:, -1:] if cache is not None else tokens
        output = model(input_ids=read.to(model.device), past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        following = _sample(output.logits[:, -1, : habits.num_tokens], rng)
        if habits.restart and habits.start is not None and habits.end is not None:
            following = following.where(tokens[:, -1] != habits.end, habits.start)
        tokens = torch.cat([tokens, following[:, None]], 1)
        stage.advance(len(starts))
    return tokens


def _starts(model: PreTrainedModel, habits: Habits, count: int, rng: torch.Generator) -> Tensor:
    """(count,) int64. Where the tokenizer has no token to start with: what the model expects after any token, so frequent ones."""
    if habits.start is not None:
        return torch.full((count,), habits.start)
    anything = torch.randint(habits.num_tokens, (count, 1), generator=rng)
    output = model(input_ids=anything.to(model.device), use_cache=False)
    return _sample(output.logits[:, -1, : habits.num_tokens], rng)


def _sample(logits: Tensor, rng: torch.Generator) -> Tensor:
    """One token a row, (rows,) int64, of the likeliest that together have the probability `TOP_P`."""
    if not logits.isfinite().all():
        raise DataError("The model can't write text: its predictions are not finite.", remedy="Check the model, or name text: --data.")
    probabilities, order = logits.float().cpu().softmax(-1).topk(min(_MOST_TOKENS, logits.shape[-1]))
    before = probabilities.cumsum(-1) - probabilities
    chosen = torch.multinomial(probabilities.where(before < TOP_P, 0), 1, generator=rng)
    return order.gather(-1, chosen)[:, 0]
