"""What goes into a network and what comes out of it: tokens and logits, or texts of several lengths and what an encoder makes of them.

Everywhere else a network reads `segments`, one tensor whose first dimension counts what is read: here they become the arguments of
transformers' classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

PADDING = -1
"""In segments of texts that aren't equally long, what comes after the end of a text."""


class Interface(ABC):
    """Of one kind of network. `task`: the name in `anyfit.tasks` of what its outputs are for. `auto`: transformers' class that makes such
    networks from a folder. `output`: what the class calls what comes out."""

    task: str
    auto: str
    output: str
    segments = 1
    """How many times as many of them are read where each is one answer, and not as many as it has tokens."""

    @abstractmethod
    def tensors(self, segments: Tensor) -> dict[str, Tensor]:
        """What the network's class and its exported graph read, by name."""

    def settings(self) -> Mapping[str, Any]:
        """What the class is told besides."""
        return {}

    @abstractmethod
    def width(self, config: PretrainedConfig) -> int:
        """Numbers that come out for each position."""

    @abstractmethod
    def example(self, config: PretrainedConfig, segments: int, length: int) -> Tensor:
        """Any segments that this network can read, of no text; the same each time."""

    def __call__(self, model: PreTrainedModel, segments: Tensor) -> Tensor:
        """What comes out. The segments are where the model computes."""
        found: Tensor = getattr(model(**self.tensors(segments), **self.settings()), self.output)
        return found


class Language(Interface):
    """Tokens, int64 (segments, length), to the logits of each next one, (segments, length, vocabulary)."""

    task, auto, output = "language", "AutoModelForCausalLM", "logits"

    def tensors(self, segments: Tensor) -> dict[str, Tensor]:
        return {"input_ids": segments}

    def settings(self) -> Mapping[str, Any]:
        return {"use_cache": False}

    def width(self, config: PretrainedConfig) -> int:
        return int(config.vocab_size)

    def example(self, config: PretrainedConfig, segments: int, length: int) -> Tensor:
        return torch.arange(segments * length).reshape(segments, length) % config.vocab_size


class Texts(Interface):
    """An encoder: tokens, int64 (segments, length), with `PADDING` after the end of a text, to hidden states, (segments, length, hidden)."""

    task, auto, output, segments = "embedding", "AutoModel", "last_hidden_state", 8

    def tensors(self, segments: Tensor) -> dict[str, Tensor]:
        """What stands in place of the padding no text can see."""
        return {"input_ids": segments.clamp_min(0), "attention_mask": present(segments).to(segments.dtype)}

    def width(self, config: PretrainedConfig) -> int:
        return int(config.hidden_size)

    def example(self, config: PretrainedConfig, segments: int, length: int) -> Tensor:
        return torch.arange(segments * length).reshape(segments, length) % config.vocab_size


def present(segments: Tensor) -> Tensor:
    """Which tokens (segments, length) are a text's and not its padding, as booleans."""
    return segments != PADDING


LANGUAGE, TEXTS = Language(), Texts()
_BY_KIND: Mapping[str, Interface] = {"bert": TEXTS}
"""Kinds that are no language models, by the `model_type` of their configuration."""


def interface_of(config: PretrainedConfig) -> Interface:
    """That of a network of this kind, cut or not."""
    return _BY_KIND.get(config.model_type.removeprefix("cut_"), LANGUAGE)
