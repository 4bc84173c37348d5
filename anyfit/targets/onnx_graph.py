"""A network as an ONNX graph without its numbers: torch's exporter, with every parameter left open.

The exporter sees parameters that all share one zero, so that a network of any size is exported in the memory of its
graph. They are inputs of the graph while it is simplified, so that nothing is computed of their numbers; whoever
writes a file says where each one's numbers come from.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from anyfit import network
from anyfit.checkpoint import Source
from anyfit.core.errors import RuntimeMissingError
from anyfit.interface import Interface, interface_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

_PREFIX = "network."
_NAME_BYTES = 16
"""What a constant's head and longer names for it take, at most."""
_EXAMPLE = (2, 16)
"""Tokens that the exporter follows through the network. No size of 1: it would be taken for a constant."""


class ExportError(Exception):
    """torch's exporter can't follow this network; the message says where it stopped."""


@dataclass(frozen=True)
class Use:
    """One place where a graph uses a matrix: the node that multiplies or looks up, and the transpositions before it.

    `kind` is the node's type: MatMul and Gemm with the matrix on the right, Gather of its rows. Any other is a use that
    only plain numbers serve. `turned`: whether it reads the matrix with rows and columns exchanged.
    """

    kind: str
    node: str
    transposes: tuple[str, ...]
    turned: bool


@dataclass(frozen=True)
class Graph:
    """Nodes in the order in which they run, all named. `open` are the parameters that it needs, by their own names."""

    nodes: tuple[NodeProto, ...]
    constants: tuple[TensorProto, ...]
    frame: GraphProto
    """Name, inputs and outputs, as the network's `Interface` calls them."""
    opset: int
    open: frozenset[str]

    @property
    def content(self) -> bytes:
        """All of it, to be compared."""
        from onnx import GraphProto

        return GraphProto(node=self.nodes, initializer=self.constants).SerializeToString(deterministic=True)

    @property
    def unshared_bytes(self) -> int:
        """What the graph would take more, at most, were every size in it a constant of its own for each node that reads it."""
        from onnx import TensorProto

        whole = [constant for constant in self.constants if constant.data_type == TensorProto.INT64]
        return sum(max(0, len(self._readers.get(constant.name, ())) - 1) * (constant.ByteSize() + _NAME_BYTES) for constant in whole)

    @cached_property
    def by_name(self) -> dict[str, NodeProto]:
        return {node.name: node for node in self.nodes}

    @cached_property
    def _readers(self) -> dict[str, list[NodeProto]]:
        readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                readers.setdefault(name, []).append(node)
        return readers

    def uses(self, name: str) -> tuple[Use, ...]:
        """Where a matrix is used, in order."""
        return tuple(use for node in self._readers.get(name, ()) for use in self._followed(node, name, (), False))

    def _followed(self, node: NodeProto, name: str, transposes: tuple[str, ...], turned: bool) -> Iterator[Use]:
        if node.op_type == "Transpose":
            for reader in self._readers.get(node.output[0], ()):
                yield from self._followed(reader, node.output[0], (*transposes, node.name), not turned)
            return
        settings = {attribute.name: attribute.f or attribute.i for attribute in node.attribute}
        kind, place = node.op_type, list(node.input).index(name)
        plain = {
            "MatMul": place == 1,
            "Gemm": place == 1 and settings.get("alpha", 1) == settings.get("beta", 1) == 1 and not settings.get("transA"),
            "Gather": place == 0 and not settings.get("axis"),
        }
        yield Use(kind if plain.get(kind) else f"unusual {kind}", node.name, transposes, turned != bool(settings.get("transB")))


def of(source: Source) -> Graph:
    """The graph of a family's network, made once a process. Raises `ExportError`, and `RuntimeMissingError` without onnx."""
    return _of(_Network(source.config.to_json_string(use_diff=False), source.trust_remote_code, source.config))


@dataclass(frozen=True)
class _Network:
    """What a graph depends on; `config` says the same as `text`."""

    text: str
    trust_remote_code: bool
    config: PretrainedConfig = field(compare=False)


@lru_cache(maxsize=8)
def _of(network_: _Network) -> Graph:
    return export(network.frame(network_.config, trust_remote_code=network_.trust_remote_code))


def export(model: PreTrainedModel) -> Graph:
    """The graph from what the network reads to what comes out, for any number of segments of any length.

    `model` may have its parameters on the meta device; its ties are restored. Raises `ExportError`, and `RuntimeMissingError` without onnx.
    """
    try:
        import onnx_ir
        import onnxscript.optimizer
    except ImportError as error:
        raise RuntimeMissingError(error.name or "onnx", "onnxruntime", "Writing ONNX") from error
    model.tie_weights()
    names = _hollow(model)
    made = _exported(model)
    for name in names:
        value = made.graph.initializers.pop(_PREFIX + name, None)
        if value is not None:
            value.const_value = None
            made.graph.inputs.append(value)
    onnxscript.optimizer.optimize(made)
    return _bare(onnx_ir.to_proto(made), names)


class _Answer(nn.Module):
    """From what the network reads, in the order of its interface, to what comes out."""

    def __init__(self, network: PreTrainedModel, interface: Interface, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.interface, self.names = network, interface, names

    def forward(self, *tensors: Tensor) -> Tensor:
        given = dict(zip(self.names, tensors, strict=True))
        found: Tensor = getattr(self.network(**given, **self.interface.settings()), self.interface.output)
        return found


def _hollow(model: PreTrainedModel) -> dict[str, str]:
    """Give every parameter numbers that take no memory, keeping shapes and ties. Returns {any name: the first of its tensor}."""
    names: dict[int, str] = {}
    first = {name: names.setdefault(id(parameter), name) for name, parameter in model.named_parameters(remove_duplicate=False)}
    hollow: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            zero = nn.Parameter(torch.zeros(()).expand(parameter.shape), requires_grad=False)
            setattr(module, name, hollow.setdefault(id(parameter), zero))
    return first


def _exported(model: PreTrainedModel) -> Any:
    """What torch makes of it, as onnx_ir keeps a model."""
    interface = interface_of(model.config)
    sizes = {dim: torch.export.Dim(("batch", "sequence")[dim]) for dim in interface.free}
    example = interface.tensors(interface.example(model.config, *_EXAMPLE))
    try:
        with network.quiet(), _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                _Answer(model, interface, list(example)),
                tuple(example.values()),
                dynamo=True,
                verbose=False,
                optimize=False,
                input_names=list(example),
                output_names=[interface.output],
                dynamic_shapes=((sizes,) * len(example),),
            )
    except Exception as error:  # the exporter fails in many ways, and each is a finding about this network
        reason = next((line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(reason) from error
    assert program is not None
    return program.model


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Neither the exporter's prints nor its warnings of operators that nobody uses, until the block ends."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _bare(made: ModelProto, names: Mapping[str, str]) -> Graph:
    """Without what the exporter notes of its own work; parameters by their own names, and no longer inputs."""
    from onnx import GraphProto

    own, proto = {_PREFIX + name: first for name, first in names.items()}, made.graph
    if made.functions or {opset.domain for opset in made.opset_import} != {""}:
        raise ExportError("it needs operators that ONNX itself doesn't have")
    frame = GraphProto(name="network", input=[v for v in proto.input if v.name not in own], output=proto.output)
    for node in proto.node:
        assert node.name, node
        node.ClearField("doc_string")
        for index, name in enumerate(node.input):
            node.input[index] = own.get(name, name)
    for item in (*proto.node, *proto.initializer, *frame.input, *frame.output):
        item.ClearField("metadata_props")
    read = {name for node in proto.node for name in node.input}
    open_ = frozenset(name for name in own.values() if name in read)
    return Graph(tuple(proto.node), tuple(proto.initializer), frame, made.opset_import[0].version, open_)
