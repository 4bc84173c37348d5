"""A network as an ONNX graph without its numbers: torch's exporter, with every parameter left open.

The exporter sees parameters that all share one zero, so that a network of any size is exported in the memory of its
graph. They are inputs of the graph while it is simplified, so that nothing is computed of their numbers; whoever
writes a file says where each one's numbers come from.

Besides tokens a language model's graph reads the keys and values of all tokens before them, and gives back these and the tokens' own:
for the first tokens they are of length 0. Each block with an attention has its own, under the names that Optimum gave them; of a cut
network their numbers of heads differ. A network whose cache the exporter can't follow has a graph of tokens alone.
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
from torch._subclasses import FakeTensorMode
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from anyfit import network
from anyfit.checkpoint import Source
from anyfit.core.errors import RuntimeMissingError
from anyfit.interface import Interface, interface_of
from anyfit.modeling_cut import NoAttention

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

PAST, PRESENT = "past_key_values", "present"
_PREFIX = "network."
_NAME_BYTES = 16
"""What a constant's head and longer names for it take, at most."""
_EXAMPLE, _EXAMPLE_PAST = (2, 16), 5
"""Tokens that the exporter follows through the network, and how many came before. No size of 1: it would be taken for a constant."""


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
    """Name, inputs and outputs, as the network's `Interface` calls them, and then what is remembered of the tokens before."""
    opset: int
    open: frozenset[str]

    @property
    def content(self) -> bytes:
        """All of it, to be compared."""
        from onnx import GraphProto

        return GraphProto(node=self.nodes, initializer=self.constants).SerializeToString(deterministic=True)

    @property
    def remembers(self) -> bool:
        """Whether it reads keys and values of the tokens before."""
        return len(self.frame.output) > 1

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
    """The graph from what the network reads to what comes out, for any number of segments of any length. Where the network remembers,
    for block i with an attention also from `past_key_values.i.key` and `.value`, float32 (batch, heads, past, numbers), to
    `present.i.key` and `.value`, past and sequence together.

    `model` may have its parameters on the meta device; its ties are restored. Raises `ExportError`, and `RuntimeMissingError` without onnx.
    """
    try:
        import onnx_ir
        import onnxscript.optimizer
    except ImportError as error:
        raise RuntimeMissingError(error.name or "onnx", "onnxruntime", "Writing ONNX") from error
    model.tie_weights()
    names = _hollow(model)
    remembered = _remembered(model)
    try:
        made = _exported(model, remembered)
    except ExportError:
        if not remembered:
            raise
        made = _exported(model, {})
    for name in names:
        value = made.graph.initializers.pop(_PREFIX + name, None)
        if value is not None:
            value.const_value = None
            made.graph.inputs.append(value)
    onnxscript.optimizer.optimize(made)
    return _bare(onnx_ir.to_proto(made), names)


class _Answer(nn.Module):
    """From what the network reads, in the order of its interface, and the keys and values of the tokens before, to what comes out and the
    keys and values of all. `names`: of what is read; `blocks`: whose keys and values they are."""

    def __init__(self, model: PreTrainedModel, interface: Interface, names: Sequence[str], blocks: Sequence[int]) -> None:
        super().__init__()
        self.network, self.interface, self.names, self.blocks = model, interface, tuple(names), tuple(blocks)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if not self.blocks:
            given = dict(zip(self.names, tensors, strict=True))
            return (getattr(self.network(**given, **self.interface.settings()), self.interface.output),)
        tokens, *past = tensors
        length = past[0].shape[-2]
        held = dict(zip(self.blocks, zip(past[::2], past[1::2], strict=True), strict=True))
        layers = [_Layer(length, held.get(index)) for index in range(self.network.config.num_hidden_layers)]
        found = getattr(network.with_cache(self.network, tokens, Cache(layers=layers)), self.interface.output)
        return found, *(tensor for index in self.blocks for tensor in (layers[index].keys, layers[index].values))


class _Layer(DynamicLayer):
    """What a block remembers of `length` tokens: keys and values, or nothing where it has no attention. All tokens are kept; where an
    attention looks back a few only, its mask says so."""

    def __init__(self, length: int, held: tuple[Tensor, Tensor] | None) -> None:
        super().__init__()
        self._length = length
        if held is not None:
            self.keys, self.values = held
            self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            return key_states, value_states
        found: tuple[Tensor, Tensor] = super().update(key_states, value_states)
        return found

    def get_seq_length(self) -> int:
        return self._length


def _remembered(model: PreTrainedModel) -> dict[int, tuple[int, int]]:
    """{block with an attention: heads of its keys and values, numbers in each}; empty where nothing is known of them."""
    if not interface_of(model.config).remembers:
        return {}
    removed = {module.layer_idx for module in model.modules() if isinstance(module, NoAttention)}
    cache = DynamicCache()
    try:
        with network.quiet(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
            network.with_cache(model, torch.zeros(_EXAMPLE, dtype=torch.int64), cache)
    except Exception:  # what a network does without numbers, and how it fails, is each class's own affair
        return {}
    shapes = {index: layer.keys.shape for index, layer in enumerate(cache.layers) if layer.keys is not None and index not in removed}
    return {index: (shape[1], shape[3]) for index, shape in shapes.items() if len(shape) == 4}


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


def _exported(model: PreTrainedModel, remembered: Mapping[int, tuple[int, int]]) -> Any:
    """What torch makes of it, as onnx_ir keeps a model."""
    interface = interface_of(model.config)
    batch, sequence, before = (torch.export.Dim(name) for name in ("batch", "sequence", "past"))
    read = interface.tensors(interface.example(model.config, *_EXAMPLE))
    names = [(index, part) for index in remembered for part in ("key", "value")]
    past = [torch.zeros(_EXAMPLE[0], heads, _EXAMPLE_PAST, size) for heads, size in remembered.values() for _ in ("key", "value")]
    free = [{dim: (batch, sequence)[dim] for dim in interface.free} for _ in read] + [{0: batch, 2: before} for _ in past]
    try:
        with network.quiet(), _quiet_exporter(), torch.no_grad():
            program = torch.onnx.export(
                _Answer(model, interface, list(read), list(remembered)),
                (*read.values(), *past),
                dynamo=True,
                verbose=False,
                optimize=False,
                input_names=[*read, *(f"{PAST}.{index}.{part}" for index, part in names)],
                output_names=[interface.output, *(f"{PRESENT}.{index}.{part}" for index, part in names)],
                dynamic_shapes=(tuple(free),),
            )
    except Exception as error:  # the exporter fails in many ways, and each is a finding about this network
        reason = next((line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()), type(error).__name__)
        raise ExportError(reason) from error
    assert program is not None
    if any(isinstance(value.shape[dim], int) for value, own in zip(program.model.graph.inputs, free, strict=True) for dim in own):
        raise ExportError("it takes as many segments and tokens as it was exported with, and no others")
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
