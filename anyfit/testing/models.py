"""Tiny random models of the real transformers classes, and a tokenizer for them: what every test runs on."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerFast

from anyfit.interface import LANGUAGE, interface_of

HIDDEN, VOCABULARY, POSITIONS = 256, 512, 512
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "initializer_range": HIDDEN**-0.5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2, "intermediate_size": 512}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "head_dim": 64, "sliding_window": None},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 64},
    "gemma": {**_GROUPED, "head_dim": 64},
    "gemma2": {**_GROUPED, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 64},
    "gemma3_text": {**_GROUPED, "head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 64},
    "gpt2": {"n_inner": 512},
    "gpt_neox": {"intermediate_size": 512},
    "opt": {"ffn_dim": 512, "word_embed_proj_dim": HIDDEN, "init_std": HIDDEN**-0.5},
    "phi3": {**_GROUPED, "original_max_position_embeddings": POSITIONS},
    "bert": {"intermediate_size": 512, "pad_token_id": 0},
    "vit": {"intermediate_size": 512, "image_size": 32, "patch_size": 8, "num_labels": 10},
}
MODEL_TYPES = tuple(_FAMILIES)
"""Every kind that `tiny_model` is sized for. Other kinds of transformers work where they know the common names."""


def tiny_model(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random network of the real class, a causal language model or an encoder: 2 blocks, hidden size 256, float32, in evaluation mode.

    Row lengths are multiples of 256, so that every format applies. Norm weights and biases are random too, so
    that one that is lost or swapped changes the outputs. `overrides` are fields of the configuration.

    >>> tiny_model("llama", tie_word_embeddings=True).config.num_hidden_layers
    2
    """
    config = AutoConfig.for_model(model_type, **{**_SIZES, **_FAMILIES.get(model_type, {}), **overrides})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, interface_of(config).auto).from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.1 * torch.randn(parameter.shape)
    model.eval()
    return model


def tiny_tokenizer(vocab_size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens (at least 258): `<s>`, `</s>`, the bytes, merges."""
    assert vocab_size >= 258, vocab_size
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([tiny_text(4 * vocab_size)], trainer)
    assert tokenizer.get_vocab_size() == vocab_size, tokenizer.get_vocab_size()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>", model_max_length=POSITIONS
    )


def tiny_text(num_words: int = 2000, seed: int = 0) -> str:
    """Sentences of made-up words: text for a tokenizer to learn from and for a tiny model to read."""
    rng = random.Random(seed)
    syllables = [first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(max(50, num_words // 8))]
    sentences = []
    while num_words > 0:
        length = min(num_words, rng.randint(4, 12))
        sentences.append(" ".join(rng.choices(words, k=length)).capitalize() + ".")
        num_words -= length
    return " ".join(sentences)


def save_tiny(folder: Path | str, model_type: str = "llama", **overrides: Any) -> Path:
    """Write `tiny_model` with `tiny_tokenizer` as a Hugging Face folder of safetensors, and return its path.

    `overrides` are `seed` and fields of the configuration, as for `tiny_model`.
    """
    folder = Path(folder)
    model = tiny_model(model_type, **overrides)
    model.save_pretrained(folder)
    if not interface_of(model.config).words:
        return folder
    tokenizer = tiny_tokenizer(model.config.vocab_size)
    if interface_of(model.config) is not LANGUAGE:  # an encoder's puts tokens around every text
        around = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
        tokenizer.backend_tokenizer.post_processor = around
    tokenizer.save_pretrained(folder)
    return folder
