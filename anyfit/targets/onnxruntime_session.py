"""A written folder as ONNX Runtime runs it on the processors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from anyfit.core.errors import RuntimeMissingError
from anyfit.interface import Interface
from anyfit.targets.onnx_file import EXACT, GRAPH
from anyfit.targets.onnx_graph import PAST, PRESENT
from anyfit.targets.onnxruntime_rounding import watched, without_rounding

if TYPE_CHECKING:
    from onnx import NodeProto
    from onnxruntime import InferenceSession

PACKAGE, EXTRA = "onnxruntime", "onnxruntime"


class OnnxRuntimeError(Exception):
    """ONNX Runtime could not load or run a file; the message is its own."""


def opened(folder: Path, *, exact: bool = False, threads: int | None = None, graph: bytes | None = None) -> InferenceSession:
    """A session on the CPU with so many threads (default: torch's). `exact`: nothing is rounded on the way. `graph`: one that is run in the
    place of the folder's, with its numbers.

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
        read = graph or (_exact(folder) if exact else folder / GRAPH)
        return onnxruntime.InferenceSession(read, settings, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes of errors derive from nothing else
        raise OnnxRuntimeError(f"ONNX Runtime can't load it: {error}") from error


def _exact(folder: Path) -> bytes:
    """The graph with the level of accuracy at which nothing is rounded on the way, and without the nodes that round."""
    import onnx

    model = onnx.load(folder / GRAPH, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = EXACT
    without_rounding(model.graph)
    return model.SerializeToString()


def feed(session: InferenceSession, interface: Interface, segments: Tensor) -> dict[str, np.ndarray]:
    """What a session reads for segments. Where it remembers, these are the first tokens of texts: there is nothing before them."""
    given = {name: tensor.numpy() for name, tensor in interface.tensors(segments).items()}
    past = {item.name: item.shape for item in session.get_inputs() if item.name not in given}
    return given | {name: np.zeros((len(segments), heads, 0, size), np.float32) for name, (_, heads, _, size) in past.items()}


def after(session: InferenceSession, given: Sequence[Any]) -> dict[str, Any]:
    """What a session remembers after a run that gave `given`, all of its outputs, as inputs of the next run."""
    (_, *names), (_, *values) = (item.name for item in session.get_outputs()), given
    return {name.replace(PRESENT, PAST, 1): value for name, value in zip(names, values, strict=True)}


def outputs(folder: Path, interface: Interface, segments: Tensor, *, exact: bool = False) -> Tensor:
    """What ONNX Runtime computes for segments, one after the other, float32. Raises as `opened`."""
    session = opened(folder, exact=exact)
    try:
        found = (session.run([interface.output], feed(session, interface, segment[None]))[0] for segment in segments)
        return torch.cat([torch.from_numpy(values) for values in found])
    except Exception as error:
        raise OnnxRuntimeError(f"ONNX Runtime can't run it: {error}") from error


def seen(folder: Path, interface: Interface, segments: Tensor) -> Iterator[tuple[NodeProto, Tensor, Tensor]]:
    """The nodes that multiply what was rounded, as people run them: each with what was read before, and what came out, for each of the
    segments. Raises as `opened`."""
    import onnx

    model = onnx.load(folder / GRAPH, load_external_data=False)
    products = watched(model)
    if not products:
        return
    session = opened(folder, graph=model.SerializeToString())
    names = list(dict.fromkeys([*(read for read, _ in products.values()), *products]))
    for segment in segments:
        try:
            given = session.run(names, feed(session, interface, segment[None]))
        except Exception as error:
            raise OnnxRuntimeError(f"ONNX Runtime can't run it product by product: {error}") from error
        found = {name: torch.from_numpy(value) for name, value in zip(names, given, strict=True)}
        yield from ((node, found[read], found[output]) for output, (read, node) in products.items())


def steps(folder: Path, interface: Interface, tokens: Tensor, first: int) -> Tensor | None:
    """The same without any rounding on the way, the `first` tokens at once, then one after the other; None where nothing is remembered."""
    session, found = opened(folder, exact=True), list[Tensor]()
    if len(session.get_outputs()) == 1:
        return None
    try:
        inputs = feed(session, interface, tokens[:, :first])
        for place in range(first, tokens.shape[1] + 1):
            given = session.run(None, inputs)
            found.append(torch.from_numpy(given[0]))
            inputs = feed(session, interface, tokens[:, place : place + 1]) | after(session, given)
    except Exception as error:
        raise OnnxRuntimeError(f"ONNX Runtime can't run it token by token: {error}") from error
    return torch.cat(found, 1)
