"""The network that goes in: a Hugging Face folder, checked before any long work starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Source:
    """What is left of the original in a family, enough to write any of its models.

    `folder` holds config.json and every file that travels with a model (tokenizer, chat template, generation
    config, and remote code where the caller allowed it). `passthrough` are the parameters that nobody decides
    about (norms, biases), by checkpoint name, in the checkpoint's own type and orientation. `tied` maps every
    other name of a shared tensor to the one that is stored. `original_bytes`: the original's weight files.
    """

    folder: Path
    config: PretrainedConfig
    passthrough: dict[str, Tensor]
    tied: dict[str, str] = field(default_factory=dict)
    original_bytes: int = 0
    trust_remote_code: bool = False

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The original's tokenizer. Raises `ModelError` where it is missing or has more tokens than the model."""
        raise NotImplementedError

    def skeleton(self) -> PreTrainedModel:
        """The network on the meta device: names, shapes and ties, no numbers."""
        raise NotImplementedError
