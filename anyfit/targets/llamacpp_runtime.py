"""llama.cpp as a reader: token ids and logits of a GGUF file, computed in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from anyfit.core.errors import RuntimeMissingError

PACKAGE, EXTRA = "llama-cpp-python", "llamacpp"
TIMEOUT_SECONDS = 1800
_PROGRAM = Path(__file__).with_name("llamacpp_process.py")


class LlamaCppError(Exception):
    """llama.cpp could not load or run a file; the message is its own."""


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    return find_spec("llama_cpp") is not None


def run(path: Path, texts: Sequence[str] = (), tokens: Tensor | None = None) -> tuple[list[list[int]], Tensor | None]:
    """Token ids of each text, and logits of `tokens` (segments, length): float32, (segments, length, vocabulary).

    Raises `RuntimeMissingError` without llama-cpp-python, `LlamaCppError` where llama.cpp fails or dies.
    """
    if not installed():
        raise RuntimeMissingError(PACKAGE, EXTRA, "Running a GGUF file")
    with tempfile.TemporaryDirectory() as folder:
        request, answer, ids, logits = (Path(folder, name) for name in ("request.json", "answer.json", "tokens.npy", "logits.npy"))
        if tokens is not None:
            np.save(ids, tokens.numpy().astype(np.int32))
        fields = {
            "model": str(path.absolute()),
            "texts": list(texts),
            "tokens": None if tokens is None else str(ids),
            "logits": str(logits),
            "threads": torch.get_num_threads(),
        }
        request.write_text(json.dumps(fields), encoding="utf-8")
        _run([str(request), str(answer)])
        found = json.loads(answer.read_text(encoding="utf-8"))["ids"]
        return found, None if tokens is None else torch.from_numpy(np.load(logits))


def logits(path: Path | str, tokens: Tensor) -> Tensor:
    """What llama.cpp itself computes for `tokens`, int64 (segments, length): float32, (segments, length, vocabulary).

    Each segment starts anew. Raises as `run`.
    """
    _, computed = run(Path(path), tokens=tokens)
    assert computed is not None
    return computed


def _run(arguments: list[str]) -> None:
    # -P: this folder has a module named transformers, which must not hide the package
    command = [sys.executable, "-P", str(_PROGRAM), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise LlamaCppError(f"llama.cpp was stopped after {TIMEOUT_SECONDS} s") from error
    if done.returncode:
        complaint = " ".join(done.stderr.split())[-500:] or "no message"
        raise LlamaCppError(f"llama.cpp ended with status {done.returncode}: {complaint}")
