"""What is looked at after a GGUF file is written: the file itself, and what three readers make of it."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.gguf_reader import ReaderTensor
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

from anyfit import network
from anyfit.checkpoint import Source
from anyfit.core.config import Config
from anyfit.core.files import is_full
from anyfit.elastic.extracted import Extracted, InMemory
from anyfit.targets import gguf_kinds, gguf_layout, llamacpp_runtime
from anyfit.targets.base import Check
from anyfit.targets.gguf_layout import Matrix

MAX_KL, MAX_KL_PLAIN = 5e-3, 1e-4
"""Nats per token; the second where every matrix is in one of `PLAIN`. llama.cpp rounds what enters any other matrix
to its type (8 bits for a quantised one), which the torch model does not; that alone costs up to half of the first."""
PLAIN = {"F32", "F16"}
SEGMENTS, LENGTH = 4, 128
PROBE = (
    "Hello, world! It's 12 o'clock; we've 3456 things (and 7.89 more) to do, don't we?\n\n"
    "def area(radius):\n    return 3.14159 * radius ** 2  # squared\n\tif x != y: pass\n"
    "Größe, café, naïve, Ελληνικά, русский, 中文字符, 日本語, 한국어 \N{GRINNING FACE}   trailing  spaces  "
)


class _DifferenceError(Exception):
    """What a reader found is not what was meant."""


def checks(path: Path, source: Source, config: Config, model: Extracted | InMemory, tokens: Tensor) -> tuple[Check, ...]:
    """Audit, the gguf package, transformers, llama.cpp. After a failed audit nothing else is worth telling."""
    matrices = gguf_layout.matrices(source, {name: model.weights[name].shape for name in config.formats}, config)
    tensors = cache(lambda: gguf.GGUFReader(path).tensors)
    source.tokenizer()  # now: reading one changes settings of transformers for a moment, which two threads mustn't do at once
    with ThreadPoolExecutor(1) as pool:
        # llama.cpp runs in a process of its own meanwhile.
        runtime = pool.submit(_llamacpp, path, source, config, model, tokens)
        audit = _look("audit", lambda: _audit(path, source, matrices, model, tensors()))
        if not audit.passed:
            return (audit,)
        read = _look("gguf package", lambda: _read_back(tensors(), source, matrices, model))
        loaded = _look("transformers", lambda: _transformers(path, source, model))
        return audit, read, loaded, *runtime.result()


def _look(name: str, compare: Callable[[], str]) -> Check:
    try:
        return Check(name, True, compare())
    except _DifferenceError as difference:
        return Check(name, False, str(difference))
    except Exception as error:  # readers fail in their own ways on a file that is wrong, and that is a finding
        if is_full(error):
            raise
        return Check(name, False, f"can't read the file: {type(error).__name__}: {error}")


def _audit(path: Path, source: Source, matrices: list[Matrix], model: Extracted | InMemory, tensors: list[ReaderTensor]) -> str:
    """Each tensor once, of the type and bytes that were predicted; header and size as predicted; nothing left out."""
    parameters = {name for name, _ in model.skeleton.named_parameters()}
    left_out = parameters - {m.source for m in matrices} - set(source.passthrough) - set(source.tied)
    if left_out:
        raise _DifferenceError(f"{min(left_out)} is in the model and not in the file")
    fixed = gguf_layout.fixed_tensors(source)
    expected = {m.name: (m.format, m.bytes_) for m in matrices} | {name: ("F32", 4 * value.numel()) for name, value in fixed.items()}
    found = [(tensor.name, (tensor.tensor_type.name, int(tensor.n_bytes))) for tensor in tensors]
    if repeated := [name for name, count in Counter(name for name, _ in found).items() if count > 1]:
        raise _DifferenceError(f"{repeated[0]} is there more than once")
    for name in sorted(expected.keys() ^ dict(found).keys()):
        raise _DifferenceError(f"{name} is {'missing' if name in expected else 'not of this model'}")
    for name, held in found:
        if held != expected[name]:
            raise _DifferenceError(f"{name} is {held[0]} in {held[1]} bytes and should be {expected[name][0]} in {expected[name][1]}")
    header = _header(source, matrices, fixed)
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            raise _DifferenceError("the metadata are not those of this model")
    size = gguf_layout.padded(len(header)) + sum(gguf_layout.padded(num_bytes) for _, num_bytes in expected.values())
    if path.stat().st_size != size:
        raise _DifferenceError(f"the file has {path.stat().st_size} bytes and should have {size}")
    return f"{len(found)} tensors, each once, types and bytes as predicted"


def _header(source: Source, matrices: list[Matrix], fixed: dict[str, Tensor]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "header.gguf")
        gguf_layout.write_header(path, source, matrices, fixed).close()
        return path.read_bytes()


def _read_back(tensors: list[ReaderTensor], source: Source, matrices: list[Matrix], model: Extracted | InMemory) -> str:
    """Every tensor, decoded by the gguf package, is bit for bit the model's."""
    decided = {matrix.name: matrix.source for matrix in matrices}
    fixed = gguf_layout.fixed_tensors(source)
    passed_on = {gguf_layout.file_name(source.config, name): name for name in source.passthrough}
    for tensor in tensors:
        if tensor.name in decided:
            for rows, expected in _oriented(source, model, decided[tensor.name]):
                _require_equal(decided[tensor.name], _dequantized(tensor, rows), expected)
        elif tensor.name in passed_on:
            name = passed_on[tensor.name]
            _require_equal(name, _dequantized(tensor), gguf_layout.stored_value(source, name, model.parameter(name)))
        else:
            _require_equal(tensor.name, _dequantized(tensor), fixed[tensor.name])
    return f"{len(tensors)} tensors bit-equal to the model's"


def _dequantized(tensor: ReaderTensor, rows: slice = slice(None)) -> Tensor:
    # A plain view: each of the many slices that the package takes of a mapped array costs more than its numbers.
    return torch.tensor(gguf.dequantize(np.asarray(tensor.data)[rows], tensor.tensor_type))


def _oriented(source: Source, model: Extracted | InMemory, name: str) -> Iterator[tuple[slice, Tensor]]:
    """Rows of a matrix as (outputs, inputs), in the file's order."""
    order = gguf_layout.row_order(source, name, model.weights[name].shape[0])
    if order is not None or model.weights[name].transposed:
        values = model.parameter(name)
        values = values.T if model.weights[name].transposed else values
        yield slice(None), values if order is None else values[order]
    else:
        yield from model.rows(name)


def _require_equal(name: str, value: Tensor, expected: Tensor) -> None:
    if value.shape != expected.shape:
        raise _DifferenceError(f"{name} has the shape {tuple(value.shape)}, not {tuple(expected.shape)}")
    if not torch.equal(value.to(expected.dtype), expected):
        raise _DifferenceError(f"{name} differs by up to {(value - expected).abs().max():.2g}")


def _transformers(path: Path, source: Source, model: Extracted | InMemory) -> str:
    """Every parameter that transformers' GGUF reader gives is bit for bit the model's."""
    kind = gguf_layout.kind(source)
    arch = gguf.MODEL_ARCH_NAMES[kind.arch]
    if source.config.is_heterogeneous:
        return "skipped: it has no class for blocks of different sizes"
    if arch not in GGUF_SUPPORTED_ARCHITECTURES:
        return f"skipped: it doesn't read GGUF files of the kind {arch}"
    if problem := model.too_large():
        return f"skipped: {problem}"
    config = AutoConfig.for_model(**source.config.to_dict() | {"model_type": kind.reader or source.config.model_type})
    with network.quiet(), contextlib.redirect_stderr(io.StringIO()):
        # its reader guesses what some keys say (head size, feed-forward size), so the sizes are given
        read = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, dtype=torch.float32, local_files_only=True
        )
    parameters = dict(read.named_parameters(remove_duplicate=False))
    names = [name for name, _ in model.skeleton.named_parameters()]
    for name in names:
        offset = kind.norm_offset if name.endswith("norm.weight") else 0
        _require_equal(name, parameters[name].detach(), model.parameter(name) + offset - offset)
    return f"{len(names)} parameters bit-equal to the model's"


def _llamacpp(path: Path, source: Source, config: Config, model: Extracted | InMemory, tokens: Tensor) -> tuple[Check, ...]:
    if not llamacpp_runtime.installed():
        package, extra = llamacpp_runtime.PACKAGE, llamacpp_runtime.EXTRA
        return (Check("llama.cpp", True, f"skipped: {package} is not installed (pip install 'anyfit[{extra}]')"),)
    window = None if gguf_layout.kind(source).window else gguf_kinds.window(source.config)
    tokens = tokens[:SEGMENTS, : min(LENGTH, window or LENGTH)]
    tokenizer = source.tokenizer()
    texts = [PROBE, tokenizer.decode(tokens[0], skip_special_tokens=True)]
    try:
        ids, logits = llamacpp_runtime.run(path, texts, tokens)
    except llamacpp_runtime.LlamaCppError as error:
        return (Check("llama.cpp", False, str(error)),)
    assert logits is not None
    bar = MAX_KL_PLAIN if PLAIN.issuperset(config.formats.values()) else MAX_KL
    return (
        _look("llama.cpp tokens", lambda: _compare_tokens(tokenizer, texts, ids)),
        _look("llama.cpp outputs", lambda: _compare_outputs(model, tokens, logits, bar, window)),
    )


def _compare_tokens(tokenizer: PreTrainedTokenizerBase, texts: list[str], ids: list[list[int]]) -> str:
    for text, found in zip(texts, ids, strict=True):
        expected = tokenizer.encode(text)
        if found != expected:
            same = next((i for i, (a, b) in enumerate(zip(found, expected, strict=False)) if a != b), min(len(found), len(expected)))
            around = tokenizer.decode(expected[max(0, same - 2) : same + 4])
            raise _DifferenceError(f"tokenises differently near {around!r}: {found[same : same + 4]} and not {expected[same : same + 4]}")
    return f"{sum(map(len, ids))} tokens of probe texts are equal"


def _compare_outputs(model: Extracted | InMemory, tokens: Tensor, logits: Tensor, bar: float, window: int | None) -> str:
    """Mean KL of llama.cpp's next-token distributions from the torch model's."""
    divergence, agreement = 0.0, 0.0
    expected = model.outputs(tokens)
    for segment, computed in zip(tokens, logits, strict=True):
        reference = expected(segment[None])[0].double().log_softmax(-1)
        other = computed.double().log_softmax(-1)
        divergence += (reference.exp() * (reference - other)).sum(-1).mean().item() / len(tokens)
        agreement += (reference.argmax(-1) == other.argmax(-1)).double().mean().item() / len(tokens)
    found = f"mean KL to the torch model {divergence:.1e} nats on {tokens.numel()} tokens, {agreement:.1%} the same first choice"
    if not divergence <= bar:
        raise _DifferenceError(f"{found}; at most {bar:.0e} is expected")
    return found if window is None else f"{found}; beyond {window} tokens they differ: llama.cpp has no sliding window for this kind"
