"""A written folder as ONNX Runtime runs it on the processors."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from anyfit.core.errors import RuntimeMissingError
from anyfit.targets.onnx_file import EXACT, GRAPH
from anyfit.targets.onnx_graph import LOGITS, PAST, PRESENT, TOKENS

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PACKAGE, EXTRA = "onnxruntime", "onnxruntime"


class OnnxRuntimeError(Exception):
    """ONNX Runtime could not load or run a file; the message is its own."""


def opened(folder: Path, *, exact: bool = False, threads: int | None = None) -> InferenceSession:
    """A session on the CPU with so many threads (default: torch's). `exact`: nothing is rounded on the way.

    Raises `RuntimeMissingError` without onnxruntime, `OnnxRuntimeError` where it can't load the file.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(PACKAGE, EXTRA, "Running an ONNX file") from error
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.inter_op_num_threads = threads or torch.get_num_threads(), 1
    settings.log_severity_level = 4
    settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder.resolve()))
    try:
        return onnxruntime.InferenceSession(_exact(folder) if exact else folder / GRAPH, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes of errors derive from nothing else
        raise OnnxRuntimeError(f"ONNX Runtime can't load it: {error}") from error


def _exact(folder: Path) -> bytes:
    """The graph with the level of accuracy at which nothing is rounded on the way."""
    import onnx

    model = onnx.load(folder / GRAPH, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = EXACT
    return model.SerializeToString()


def feed(session: InferenceSession, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Inputs of a session for the first tokens of texts, int64 (batch, sequence): nothing is remembered yet."""
    past = {item.name: item.shape for item in session.get_inputs() if item.name != TOKENS}
    return {TOKENS: tokens, **{name: np.zeros((len(tokens), heads, 0, size), np.float32) for name, (_, heads, _, size) in past.items()}}


def after(session: InferenceSession, given: Sequence[Any]) -> dict[str, Any]:
    """What a session remembers after a run that gave `given`, all of its outputs, as inputs of the next run."""
    names = [item.name for item in session.get_outputs()]
    return {name.replace(PRESENT, PAST, 1): value for name, value in zip(names, given, strict=True) if name != LOGITS}


def logits(folder: Path, tokens: Tensor, *, exact: bool = False) -> Tensor:
    """What ONNX Runtime computes for tokens, int64 (segments, length): float32 (segments, length, vocabulary). Raises as `opened`."""
    session = opened(folder, exact=exact)
    try:
        return torch.cat([torch.from_numpy(session.run([LOGITS], feed(session, segment[None].numpy()))[0]) for segment in tokens])
    except Exception as error:
        raise OnnxRuntimeError(f"ONNX Runtime can't run it: {error}") from error


def steps(folder: Path, tokens: Tensor, first: int) -> Tensor | None:
    """The same without any rounding on the way, the `first` tokens at once, then one after the other; None where nothing is remembered."""
    session, found = opened(folder, exact=True), list[Tensor]()
    if len(session.get_outputs()) == 1:
        return None
    try:
        inputs = feed(session, tokens[:, :first].numpy())
        for place in range(first, tokens.shape[1] + 1):
            outputs = session.run(None, inputs)
            found.append(torch.from_numpy(outputs[0]))
            inputs = {TOKENS: tokens[:, place : place + 1].numpy(), **after(session, outputs)}
    except Exception as error:
        raise OnnxRuntimeError(f"ONNX Runtime can't run it token by token: {error}") from error
    return torch.cat(found, 1)
