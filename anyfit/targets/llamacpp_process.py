"""Run a GGUF file in llama.cpp, in a process of its own: it aborts the process where it finds a file wrong.

The other process runs this very file as a program, which is why nothing of anyfit is imported here.

    python llamacpp_process.py REQUEST.json ANSWER.json

The request names the file (`model`), texts to tokenise (`texts`), optionally an array of token ids to run
(`tokens`, a .npy of shape (segments, length)) and where its logits go (`logits`, a .npy of float32, shape
(segments, length, vocabulary)), and the number of `threads`.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

ERROR_LEVEL = 4


def main(request_path: str, answer_path: str) -> None:
    """Answer one request; ends the process with llama.cpp's own message where it can't."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    complaints: list[str] = []
    callback = llama_cpp.llama_log_callback(
        lambda level, text, _: complaints.append(text.decode(errors="replace")) if level >= ERROR_LEVEL else None
    )
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(request["model"].encode(), _as_stored())
    if not model:
        sys.exit("".join(complaints).strip() or "llama.cpp can't load the file and doesn't say why")
    ids = [_tokenise(model, text) for text in request["texts"]]
    if request["tokens"]:
        _logits(model, np.load(request["tokens"]), request)
    llama_cpp.llama_model_free(model)
    Path(answer_path).write_text(json.dumps({"ids": ids}), encoding="utf-8")


def _as_stored() -> Any:
    """Matrices as they lie in the file: no repacked copies, whose AMX kernels kill the process on some machines."""
    settings = llama_cpp.llama_model_default_params()
    settings.use_extra_bufts = False
    return settings


def _tokenise(model: Any, text: str) -> list[int]:
    vocabulary, data = llama_cpp.llama_model_get_vocab(model), text.encode()
    ids = (llama_cpp.llama_token * (len(data) + 8))()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, len(ids), True, True)
    assert count >= 0, (count, len(ids))
    return list(ids[:count])


def _logits(model: Any, tokens: np.ndarray, request: dict[str, Any]) -> None:
    """One segment at a time. A cache of 32-bit floats, so that only the weights' own rounding is seen."""
    segments, length = tokens.shape
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    settings.n_threads = settings.n_threads_batch = request["threads"]
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        sys.exit("llama.cpp can't make a context for this file")
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    out = np.lib.format.open_memmap(request["logits"], mode="w+", dtype=np.float32, shape=(segments, length, width))
    batch = llama_cpp.llama_batch_init(length, 0, 1)
    for segment in range(segments):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = length
        for place, token in enumerate(tokens[segment].tolist()):
            batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
            batch.seq_id[place][0], batch.logits[place] = 0, True
        if code := llama_cpp.llama_decode(context, batch):
            sys.exit(f"llama.cpp can't run the file: llama_decode returned {code}")
        out[segment] = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (length, width))
    out.flush()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)


if __name__ == "__main__":
    main(*sys.argv[1:])
