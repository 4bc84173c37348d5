"""What is looked at after an ONNX folder is written: both files, every number as the graph reads it, and what ONNX Runtime computes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anyfit.activations import Static
from anyfit.core.files import is_full
from anyfit.elastic.extracted import Extracted, InMemory
from anyfit.interface import Interface, interface_of, present
from anyfit.targets import onnx_file, onnxruntime_session
from anyfit.targets.base import Check
from anyfit.targets.onnx_file import GRAPH, NUMBERS, Layout
from anyfit.targets.onnxruntime_rounding import PRODUCT
from anyfit.targets.safetensors_file import EMPTY_BYTES, Slot
from anyfit.tasks import task_of

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

OUTPUTS_BAR, OUTPUTS_SHARE = 1e-3, 1e-4
"""Largest difference of an output where nothing is rounded on the way; where outputs are large, this share of the largest."""
PRODUCT_SHARE = 1e-5
"""Largest difference of a product whose inputs are rounded from the model's of the same inputs, as a share of its largest output. Products
are looked at one by one: a difference in the last place before one makes another code of a number here and there, and codes of the next
products differ for it until their errors have little in common, whoever rounds."""
SEGMENTS, LENGTH = 2, 128
STEPS = 8
"""Tokens that are also run one after the other."""


class _DifferenceError(Exception):
    """What a file holds is not what was meant."""


def checks(path: Path, layout: Layout, model: Extracted | InMemory, tokens: Tensor) -> tuple[Check, ...]:
    """Audit, numbers, ONNX Runtime. The later ones are left out where one fails."""
    looks = {
        "audit": lambda: _audit(path, layout),
        "values": lambda: _values(path, layout, model),
        "onnxruntime": lambda: _outputs(path, model, tokens[:SEGMENTS, :LENGTH]),
    }
    done: list[Check] = []
    for name, look in looks.items():
        try:
            done.append(Check(name, True, look()))
        except (_DifferenceError, SafetensorError, onnxruntime_session.OnnxRuntimeError, OSError) as error:
            if is_full(error):
                raise
            return (*done, Check(name, False, str(error)))
    return tuple(done)


def _audit(path: Path, layout: Layout) -> str:
    """The graph is the one that was meant; each tensor once, of its type and shape; the file as long as that makes it."""
    if (path / GRAPH).read_bytes() != layout.content:
        raise _DifferenceError(f"{GRAPH} is not the graph of this network and config")
    expected = {slot.name: slot for slot in layout.slots}
    with safe_open(path / NUMBERS, framework="pt") as file:
        found = {name: Slot.of(name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118 (it has no iterator of its own)
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise _DifferenceError(f"{len(wrong)} tensors are missing, left over, or of another type or shape: {', '.join(wrong[:5])}")
    predicted, size = EMPTY_BYTES + sum(slot.bytes_ for slot in layout.slots), (path / NUMBERS).stat().st_size
    if size != predicted:
        raise _DifferenceError(f"{NUMBERS} has {size} bytes and should have {predicted}")
    return f"{len(found)} tensors, each once; {size + len(layout.content)} bytes as predicted"


def _values(path: Path, layout: Layout, model: Extracted | InMemory) -> str:
    """Every parameter, as the nodes of the written graph read it from where the graph says it lies, is the model's to the bit."""
    import onnx

    graph = onnx.load(path / GRAPH, load_external_data=False).graph
    data = np.memmap(path / NUMBERS, dtype=np.uint8, mode="r")
    tensors = {tensor.name: tensor for tensor in graph.initializer if tensor.external_data}
    read = set()
    for node in graph.node:
        if node.op_type in onnx_file.READERS:
            name = node.input[onnx_file.READERS[node.op_type]].rpartition(".")[0]
            rounds = node.op_type == PRODUCT
            weight, values = model.weight(name), (_unscaled if rounds else _dequantized)(node, tensors, data)
            if rounds and node.input[2] in tensors:
                _require_grid(name, node, tensors, data, model)
            read.add(_required_equal(name, values.T if weight and weight.transposed else values, model))
        elif node.op_type == "Cast" and node.input[0].endswith(".half"):
            read.add(_required_equal(node.output[0], _array(tensors[node.input[0]], data).astype(np.float32), model))
    for name in sorted(tensors.keys() & layout.parameters):
        read.add(_required_equal(name, _array(tensors[name], data), model))
    if read != layout.parameters:
        raise _DifferenceError(f"{min(read ^ layout.parameters)} is not read, or not of this network")
    return f"{len(read)} parameters bit-equal to the model's"


def _array(tensor: TensorProto, data: np.ndarray) -> np.ndarray:
    """A tensor of the graph, from where it says that its numbers lie."""
    from onnx import helper

    place = {entry.key: entry.value for entry in tensor.external_data}
    start, length = int(place["offset"]), int(place["length"])
    return data[start : start + length].view(helper.tensor_dtype_to_np_dtype(tensor.data_type)).reshape(tensor.dims)


def _unscaled(node: NodeProto, tensors: dict[str, TensorProto], data: np.ndarray) -> np.ndarray:
    """The matrix, float32 (rows, columns), of a node that multiplies what was rounded."""
    codes, scales = (_array(tensors[node.input[place]], data) for place in (1, 3))
    return (codes.astype(np.float32) * scales).T


def _require_grid(name: str, node: NodeProto, tensors: dict[str, TensorProto], data: np.ndarray, model: Extracted | InMemory) -> None:
    """That inputs are rounded on the grid that the model has for them."""
    scale, zero = (_array(tensors[node.input[place]], data).item() for place in (2, 4))
    if model.rounding(name) != Static(scale, zero):
        raise _DifferenceError(f"what {name} reads is rounded on another grid than the extracted model's")


def _dequantized(node: NodeProto, tensors: dict[str, TensorProto], data: np.ndarray) -> np.ndarray:
    """The matrix, float32 (rows, columns), that a node makes of codes, scales and zero points by its documentation."""
    settings = {attribute.name: attribute.i for attribute in node.attribute}
    bits, place = settings["bits"], onnx_file.READERS[node.op_type]
    scales = _array(tensors[node.input[2].removesuffix("32")], data).astype(np.float32)
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if len(node.input) > 3:
        zeros = _fields(_array(tensors[node.input[3]], data), bits)[:, : scales.shape[1]]
    codes = _fields(_array(tensors[node.input[place]], data).reshape(len(scales), -1), bits)
    groups = codes.reshape(*scales.shape, -1)
    assert groups.shape[2] == settings["block_size"], (node.name, groups.shape)
    values = (groups.astype(np.float32) - zeros[..., None].astype(np.float32)) * scales[..., None]
    return values.reshape(len(scales), -1)


def _fields(data: np.ndarray, bits: int) -> np.ndarray:
    """Numbers of so many bits, the lowest of each byte first: uint8 (rows, bytes) to (rows, bytes * 8 / bits)."""
    return (data[..., None] >> np.arange(0, 8, bits, dtype=np.uint8) & (2**bits - 1)).reshape(len(data), -1)


def _required_equal(name: str, values: np.ndarray, model: Extracted | InMemory) -> str:
    expected, found = model.parameter(name), torch.from_numpy(np.array(values))
    if found.shape != expected.shape or not torch.equal(found, expected):
        raise _DifferenceError(f"{name} is not the extracted model's")
    return name


def _outputs(path: Path, model: Extracted | InMemory, tokens: Tensor) -> str:
    """Outputs where nothing is rounded on the way against the extracted model's; how far off is what people run."""
    if find_spec("onnxruntime") is None:
        return "skipped: onnxruntime is not installed (pip install 'anyfit[onnxruntime]')"
    if problem := model.too_large():
        return f"skipped: {problem}"
    interface, task = interface_of(model.config), task_of(model.config)
    expected = model.outputs(tokens, rounded=False)
    exact, answers = onnxruntime_session.outputs(path, interface, tokens, exact=True), expected(tokens)
    difference, bar = float((exact - answers).abs().max()), max(OUTPUTS_BAR, OUTPUTS_SHARE * float(answers.abs().max()))
    found = f"largest difference of {interface.output} {difference:.1e} (bar {bar:.0e}) in float32"
    if not difference <= bar:
        raise _DifferenceError(found)
    first = tokens.shape[1] - min(STEPS, tokens.shape[1] // 2)
    stepped = onnxruntime_session.steps(path, interface, tokens, first) if interface.remembers else None
    if stepped is not None:
        difference = float((stepped - answers).abs().max())
        found += f", {difference:.1e} token by token"
        if not difference <= bar:
            raise _DifferenceError(found)
    if products := _products(path, interface, tokens, model):
        found, expected = f"{found}; {products}", model.outputs(tokens)
    fast = task.reference(expected, tokens).measured(lambda segments: onnxruntime_session.outputs(path, interface, segments))
    read = f"{int(present(tokens).sum())} tokens" if interface.words else f"{len(tokens)} pictures"
    return f"{found}; as people run it, {fast.distance} {fast.loss:.1e} on {read}"


def _products(path: Path, interface: Interface, tokens: Tensor, model: Extracted | InMemory) -> str:
    """What ONNX Runtime rounds and multiplies, as people run it, against the model's rounding of the same inputs; empty where it rounds
    nothing."""
    worst: dict[str, float] = {}
    for node, inputs, outputs in onnxruntime_session.seen(path, interface, tokens):
        name = node.input[1].rpartition(".")[0]
        weight, rounding, values = model.weight(name), model.rounding(name), model.parameter(name)
        if rounding is None:
            raise _DifferenceError(f"what {name} reads is rounded in the file alone")
        made = rounding(inputs) @ (values if weight and weight.transposed else values.T)
        if len(node.input) > 6:
            made += model.parameter(node.input[6])
        share = float((outputs - made).abs().max() / made.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
        if not share <= PRODUCT_SHARE:
            raise _DifferenceError(f"{name} differs by {share:.1e} of its largest output (bar {PRODUCT_SHARE:.0e}), its inputs rounded")
        worst[name] = max(share, worst.get(name, 0.0))
    if not worst:
        return ""
    return f"{len(worst)} products of rounded inputs within {max(worst.values()):.1e} of their largest output (bar {PRODUCT_SHARE:.0e})"
