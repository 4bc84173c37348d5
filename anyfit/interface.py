"""What goes into a network and what comes out of it: tokens and logits, texts of several lengths and what an encoder makes of them,
pictures and the logits of their classes.

Everywhere else a network reads `segments`, one tensor whose first dimension counts what is read: here they become the arguments of
transformers' classes.
"""

from __future__ import annotations

import math
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
    words = True
    """Whether tokens are read, and there is a tokenizer."""
    remembers = False
    """Whether tokens are also read one after the other, with the keys and values of those before in a cache."""
    free: tuple[int, ...] = (0, 1)
    """Dimensions of segments that an exported graph leaves open."""
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

    def length(self, config: PretrainedConfig) -> int | None:
        """Positions of every segment, where the network can't read others."""
        return None

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
    remembers = True

    def tensors(self, segments: Tensor) -> dict[str, Tensor]:
        return {"input_ids": segments}

    def settings(self) -> Mapping[str, Any]:
        return {"use_cache": False}

    def width(self, config: PretrainedConfig) -> int:
        return int(config.vocab_size)

    def example(self, config: PretrainedConfig, segments: int, length: int) -> Tensor:
        return torch.arange(segments * length).reshape(segments, length) % config.vocab_size


class Texts(Interface):
    """An encoder: tokens, int64 (segments, length), with `PADDING` after a text's end, to hidden states, (segments, length, hidden)."""

    task, auto, output, segments = "embedding", "AutoModel", "last_hidden_state", 4

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


class Pictures(Interface):
    """Pictures, float32 (segments, channels, height, width), to the logits of their classes, (segments, classes)."""

    task, auto, output, segments = "classes", "AutoModelForImageClassification", "logits", 4
    words, free = False, (0,)

    def tensors(self, segments: Tensor) -> dict[str, Tensor]:
        return {"pixel_values": segments}

    def width(self, config: PretrainedConfig) -> int:
        return int(config.num_labels)

    def length(self, config: PretrainedConfig) -> int:
        """Patches, and one position for the class."""
        height, width = size(config)
        return height // config.patch_size * (width // config.patch_size) + 1

    def example(self, config: PretrainedConfig, segments: int, length: int) -> Tensor:
        shape = (segments, config.num_channels, *size(config))
        return (torch.arange(math.prod(shape), dtype=torch.float32) % 251 / 125 - 1).reshape(shape)


def size(config: PretrainedConfig) -> tuple[int, int]:
    """Height and width of the pictures that a network reads."""
    given = config.image_size
    return (int(given), int(given)) if isinstance(given, int) else (int(given[0]), int(given[1]))


LANGUAGE, TEXTS, PICTURES = Language(), Texts(), Pictures()
_BY_KIND: Mapping[str, Interface] = {"bert": TEXTS, "vit": PICTURES}
"""Kinds that are no language models, by the `model_type` of their configuration."""


def interface_of(config: PretrainedConfig) -> Interface:
    """That of a network of this kind, cut or not."""
    return _BY_KIND.get(config.model_type.removeprefix("cut_"), LANGUAGE)
