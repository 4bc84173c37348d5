"""A GGUF file as a torch model, by transformers' own reader, which is checked: it guesses what it doesn't read."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from anyfit import network
from anyfit.core.errors import ModelError
from anyfit.targets import gguf_kinds, gguf_metadata, gguf_tokenizer

_TOKENIZER_KEYS = ("model", "pre", "tokens", "merges", "add_bos_token", "add_eos_token", "add_space_prefix")
_REMEDY = "Measure the family that it was made of, at the same budget, or the folder that it was converted from."


def read_model(path: Path | str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The network of a GGUF file with its weights as float32, ready to run, and its tokenizer.

    Raises `ModelError` where the file can't be read, or where transformers makes another network or another
    tokenizer of it than llama.cpp would.
    """
    path = Path(path)
    try:
        reader = gguf.GGUFReader(path)
        # transformers reports by exceptions of many kinds, and shows progress bars that can't be switched off
        with network.quiet(), contextlib.redirect_stderr(io.StringIO()):
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True)
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(f"{path} can't be read as a torch model: {reason}", remedy=_REMEDY) from error
    if misread := _misread(reader, model, tokenizer):
        raise ModelError(f"transformers reads {path} as something else: {misread}.", remedy=_REMEDY)
    return model.eval().requires_grad_(False), tokenizer


def _misread(reader: gguf.GGUFReader, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """What we would write for this model and tokenizer, against what the file says."""
    arch = reader.get_field(gguf.Keys.General.ARCHITECTURE).contents()
    kind = gguf_kinds.KINDS.get(model.config.model_type)
    if kind is None or gguf.MODEL_ARCH_NAMES[kind.arch] != arch:
        return f"a {model.config.model_type}, and the file holds a {arch}"
    if problem := gguf_kinds.refuses(model.config, kind):
        return problem
    writer = gguf.GGUFWriter(None, arch)
    gguf_metadata.add_network(writer, model.config, kind)
    try:
        gguf_tokenizer.write(writer, gguf_tokenizer.read(tokenizer, model.config))
    except ModelError as error:
        return error.problem
    ours = {key: value.value for key, value in writer.kv_data[0].items()}
    tables = set(gguf_metadata.rotary_tensors(model.config, kind))
    if missed := {tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")} ^ tables:
        return f"{min(missed)} is left out"
    for key in [f"tokenizer.ggml.{name}" for name in _TOKENIZER_KEYS] + [key for key in reader.fields if key.startswith(f"{arch}.")]:
        field = reader.get_field(key)
        if field is not None and not _same(field.contents(), ours.get(key)):
            return f"{key} doesn't agree"
    return None


def _same(stored: Any, ours: Any) -> bool:
    if isinstance(stored, list):
        return stored == list(ours or ())
    return stored == ours or (isinstance(stored, float) and ours is not None and abs(stored - ours) <= 1e-6 * abs(ours))
