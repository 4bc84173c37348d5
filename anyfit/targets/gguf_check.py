"""What is looked at after a GGUF file is written: the file itself, and what three readers make of it."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.pytorch_utils import Conv1D

from anyfit import network
from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.formats import formats
from anyfit.formats.base import CastFormat
from anyfit.targets import gguf_layout, llamacpp_runtime
from anyfit.targets.base import Check
from anyfit.targets.gguf_layout import Matrix

MAX_KL = 5e-3
"""Nats per token. llama.cpp rounds what enters a quantised matrix to 8 bits, which alone costs up to half of this."""
MAX_KL_PLAIN = 1e-4
"""Nats per token where no matrix is quantised."""
SEGMENTS, LENGTH = 4, 128
PROBE = (
    "Hello, world! It's 12 o'clock; we've 3456 things (and 7.89 more) to do, don't we?\n\n"
    "def area(radius):\n    return 3.14159 * radius ** 2  # squared\n\tif x != y: pass\n"
    "Größe, café, naïve, Ελληνικά, русский, 中文字符, 日本語, 한국어 \N{GRINNING FACE}   trailing  spaces  "
)


def checks(path: Path, source: Source, config: Config, model: PreTrainedModel, tokens: Tensor) -> tuple[Check, ...]:
    """Audit, the gguf package, transformers, llama.cpp. After a failed audit nothing else is worth trying."""
    matrices = _matrices(source, config, model)
    audit = _audit(path, source, matrices, model)
    if not audit.passed:
        return (audit,)
    return (
        audit,
        _check("gguf package", lambda: _read_back(path, source, matrices, model)),
        _check("transformers", lambda: _transformers(path, source, model)),
        *_llamacpp(path, source, config, model, tokens),
    )
