"""What transformers does for us, in one place: config, tokenizer and network from a folder, silently and offline."""

from __future__ import annotations

import copy
import inspect
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.utils import logging

from anyfit.core.errors import ModelError
from anyfit.interface import LANGUAGE, interface_of

_TOKENIZER_STARTS = ("tokenizer", "vocab", "merges", "spiece", "sentencepiece")


def read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The config of a causal language model, or of another kind that anyfit knows. Raises `ModelError` for any other."""
    raw = _raw_config(folder)
    kind = raw["model_type"]
    if "quantization_config" in raw:
        raise ModelError(f"{folder} is quantised already: its config.json has a quantization_config.", remedy="Use the original weights.")
    if kind not in CONFIG_MAPPING and not trust_remote_code:
        if "auto_map" in raw:
            raise ModelError(
                f"{folder} comes with its own code for {kind!r}, which is not run unless you allow it.",
                remedy="Read that code; if you trust it, pass trust_remote_code=True (--trust-remote-code).",
            )
        raise ModelError(
            f"{folder / 'config.json'} has the model_type {kind!r}, which this version of transformers doesn't know.",
            remedy="Upgrade transformers, or check config.json.",
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'} can't be used: {_reason(error)}", remedy="Correct config.json.") from error
    _require_known(folder, config, raw)
    return config


def skeleton(config: PretrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """The network on the meta device, ties in place, in evaluation mode and without gradients."""
    with quiet(), torch.device("meta"):
        model = _auto(config).from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code)
    return model.eval().requires_grad_(False)


def frame(config: PretrainedConfig, *, trust_remote_code: bool) -> PreTrainedModel:
    """The network in float32 with its parameters on the meta device and its buffers real, as transformers computes them."""
    with quiet(), init_empty_weights(include_buffers=False):
        model = _auto(config).from_config(copy.deepcopy(config), trust_remote_code=trust_remote_code, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def assemble(model: PreTrainedModel, folder: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> PreTrainedModel:
    """A network of the skeleton's class with these numbers, made by transformers' own loader.

    So buffers that no file stores (rotary frequencies) are what they would be for anyone else. Nothing is
    initialised at random: every parameter must be given, shared ones under any of their names.
    """
    with quiet():
        loaded: Any = type(model).from_pretrained(
            None, config=model.config, state_dict=dict(tensors), dtype=dtype, local_files_only=True, output_loading_info=True
        )
        built, info = loaded
        _read_generation(built, folder)
    buffers = {name for name, _ in built.named_buffers()}
    assert not info["missing_keys"] - buffers and not info["mismatched_keys"], info
    return cast(PreTrainedModel, built.requires_grad_(False))


def with_cache(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> Any:
    """What a model gives for tokens (batch, sequence) that come after those of the cache."""
    # transformers 5.24 gave the argument another name
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return model(tokens, use_cache=True, **{name: cache})


def fill(model: PreTrainedModel, folder: Path, tensors: Mapping[str, Tensor]) -> PreTrainedModel:
    """A `frame` from which parts were cut, with these numbers in float32: every tensor that a file of it holds, each once."""
    with quiet():
        missing, unknown = model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False, assign=True)
        model.tie_weights()
        _read_generation(model, folder)
    assert not unknown and not any(value.is_meta for value in model.parameters()), (missing, unknown)
    return model.requires_grad_(False)


def _read_generation(model: PreTrainedModel, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)


def parameter_names(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, str | None]:
    """The network's own name for each stored tensor, as transformers' loader finds it.

    None for a tensor that the loader takes apart or merges with others, so that no parameter is stored as it is.
    """
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    converters = [change for change in changes if isinstance(change, WeightConverter)]
    known = model.state_dict()
    names: dict[str, str | None] = {}
    for name in sorted(stored):
        renamed, converter = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        names[name] = renamed if converter is None else None
    return names


def read_tokenizer(folder: Path, config: PretrainedConfig, *, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer in the folder. Raises `ModelError` where it is missing or has more tokens than the model."""
    if not any(path.name.startswith(_TOKENIZER_STARTS) or path.suffix == ".model" for path in folder.iterdir()):
        raise ModelError(
            f"{folder} has no tokenizer.",
            remedy="Save it beside the weights: AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained(FOLDER).",
        )
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise ModelError(
            f"The tokenizer in {folder} can't be used: {_reason(error)}", remedy="Save it again beside the weights."
        ) from error
    num_tokens, rows = _num_tokens(folder, tokenizer), config.get_text_config().vocab_size
    if num_tokens == 0:
        raise ModelError(
            f"The tokenizer in {folder} is empty.", remedy="Copy tokenizer.json (or tokenizer.model) of the model beside the weights."
        )
    if num_tokens > rows:
        raise ModelError(
            f"The tokenizer in {folder} has {num_tokens} tokens, but the model's embedding has {rows} rows.",
            remedy="Use the tokenizer that the model was trained with.",
        )
    return tokenizer


@contextmanager
def quiet() -> Iterator[None]:
    """Neither warnings nor progress bars of transformers, until the block ends."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _num_tokens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the highest token of the files.

    Not of the loaded tokenizer where that can be helped: some classes of transformers add a token for the
    unknown that the model never had, and byte-level tokenizers never produce it.
    """
    path = folder / "tokenizer.json"
    vocabulary = Tokenizer.from_file(str(path)).get_vocab() if path.is_file() else tokenizer.get_vocab()
    return max(vocabulary.values(), default=-1) + 1


def _raw_config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(f"{folder} has no config.json.", remedy="Name the folder that holds config.json and the weights.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {_reason(error)}.", remedy="Download or save it again.") from error
    if not isinstance(raw, dict) or not isinstance(raw.get("model_type"), str):
        raise ModelError(f"{path} has no model_type.", remedy="Use a config.json that transformers wrote.")
    return raw


def _auto(config: PretrainedConfig) -> Any:
    """transformers' class that makes a network of this kind."""
    return getattr(transformers, interface_of(config).auto)


def _require_known(folder: Path, config: PretrainedConfig, raw: Mapping[str, object]) -> None:
    """A decoder that reads text alone, or an encoder without a head: what this version compresses."""
    interface = interface_of(config)
    if interface is not LANGUAGE:
        _require_bare(folder, config, interface.auto)
        return
    if config.get_text_config() is not config:
        raise ModelError(f"{folder} is a {config.model_type} that reads more than text.", remedy="Use a text-only model.")
    auto_map = raw.get("auto_map")
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or (isinstance(auto_map, dict) and "AutoModelForCausalLM" in auto_map)
    tasks = [name.split("For")[1] for name in config.architectures or () if "For" in name]
    if not known or config.is_encoder_decoder or (tasks and "CausalLM" not in tasks):
        named = ", ".join(config.architectures or [config.model_type])
        raise ModelError(f"{folder} is no causal language model ({named}).", remedy="Use a model that predicts the next token.")


def _require_bare(folder: Path, config: PretrainedConfig, auto: str) -> None:
    """An encoder as its class is made: what else comes after it would be lost."""
    named = list(config.architectures or ())
    wanted = auto.removeprefix("Auto").partition("For")[2] or "Model"
    if getattr(config, "is_decoder", False) or any(not name.endswith(wanted) for name in named):
        raise ModelError(
            f"{folder} is a {config.model_type} of another kind ({', '.join(named)}) than anyfit compresses ({auto}).",
            remedy=f"Save that kind: {auto}.from_pretrained(FOLDER).save_pretrained(NEW_FOLDER), the other files beside it.",
        )


def _reason(error: Exception) -> str:
    """The first line of the message, with the next where it only announces it; of a `KeyError`, what it is besides."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {reason}" if isinstance(error, KeyError) else reason
