"""How an ONNX file keeps a matrix: which tensors, which nodes read them, and what both take, to the byte.

`model.onnx` holds the graph, `weights.safetensors` the numbers: ONNX lets a tensor's data lie anywhere in another
file. Found by loading files with ONNX Runtime 1.32, and checked again on every export:

- A matrix of integers is one tensor of codes, packed as our formats pack them, and one of halves. Where it multiplies,
  MatMulNBits reads them; where rows are looked up, GatherBlockQuantized does. Both want the same bytes in another shape,
  so a table that is also the head is two tensors of the graph at one place of the file.
- Without zero points, a code c stands for c - 2^(b-1), which is our symmetric kind. Zero points are packed like codes.
- Scales must have the type of what is multiplied, so a Cast makes float32 of the halves; it runs once, on loading.
- `accuracy_level` 4 lets the kernels round what enters a matrix to 8 bits in blocks, which is what makes them fast. At 0
  they multiply in float32: the same file, exact and slow.
- What `int8_dynamic` and `int8_static` round is rounded by a node of ONNX's own, DynamicQuantizeLinear or QuantizeLinear, and multiplied by
  MatMulIntegerToFloat, with the codes in columns of inputs. Matrices that read the same share the former: equal nodes become one on
  loading. Signed codes are what kernels of processors with instructions for them (VNNI, AMX) are written for, and fast; older ones may
  saturate sums of two products, which the check then shows.
- Numbers in a graph take as many bytes as they need, and so does the length of the graph itself. Offsets are written with
  leading zeros and the length with all five bytes, so that a matrix adds the same bytes whatever else there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from anyfit.activations import Static
from anyfit.core.units import Weight
from anyfit.formats import INTEGER_GROUPS, formats
from anyfit.formats.base import CastFormat
from anyfit.formats.fields import pack_dense, pack_fields
from anyfit.formats.integer import IntegerFormat
from anyfit.formats.w8a8 import RoundedFormat, StaticFormat
from anyfit.targets.onnx_graph import Graph, Use
from anyfit.targets.safetensors_file import EMPTY_BYTES, Slot, offsets

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

GRAPH, NUMBERS = "model.onnx", "weights.safetensors"
BITS, KINDS = (8, 4, 2), ("asym", "sym")
READERS = {"MatMulNBits": 1, "GatherBlockQuantized": 0, "MatMulIntegerToFloat": 1}
"""The nodes that read a matrix of integers, and which of their inputs is the codes."""
ROUNDED = ("int8_static", "int8_dynamic")
"""Formats of matrices whose inputs are rounded as well."""
ROUNDING = ("QuantizeLinear", "DynamicQuantizeLinear")
"""The nodes that round, of each of these formats."""
ENCODERS_ONLY = "inputs are rounded to 8 bits in encoders only: here tokens are read one by one, too, and would be rounded otherwise"
DTYPES = {"F32": torch.float32, "F16": torch.float16}
FAST, EXACT = 4, 0
"""Levels of accuracy: of what is written, and of what is compared."""
_CONTRIB, _CONTRIB_VERSION, _IR_VERSION = "com.microsoft", 1, 10
_OFFSET_WIDTH = 13
_LENGTH_WIDTH = 5
"""Bytes of a length in a protobuf, at most; a graph takes at most 2 GiB."""
_GRAPH_FIELD = b"\x3a"


@dataclass(frozen=True)
class Part:
    """What a matrix is in a graph: where its numbers lie, the nodes that run once on loading, and those that others make way for.

    `instead` maps names of nodes of the exported graph to what stands in their place.
    """

    tensors: tuple[TensorProto, ...]
    casts: tuple[NodeProto, ...]
    instead: Mapping[str, tuple[NodeProto, ...]]


@dataclass(frozen=True)
class Place:
    """One matrix of one graph."""

    weight: Weight
    graph: Graph

    @property
    def uses(self) -> tuple[Use, ...]:
        return self.graph.uses(self.weight.name)

    def refuses(self, name: str) -> str | None:
        """Why this matrix can't be stored in a format; None where it can."""
        format_ = formats.get(name)
        if isinstance(format_, CastFormat):
            return None
        for use in self.uses:
            if use.kind not in ("MatMul", "Gemm", "Gather"):
                return f"ONNX Runtime multiplies integers by MatMul only, and this network's graph has an {use.kind} here"
            if use.turned == (self.weight.transposed or use.kind == "Gather"):
                return "ONNX Runtime keeps integers in rows of inputs, and this network's graph reads the matrix the other way"
            if format_.rounds and use.kind == "Gather":
                return "rows are looked up in it, so it multiplies nothing whose numbers could be rounded"
        if format_.rounds and self.graph.remembers:
            return ENCODERS_ONLY
        return format_.refuses(self.weight.shape)

    def substitute(self, name: str) -> str:
        """The nearest format to one that is refused: smaller groups of the same integers, otherwise 16 bits."""
        integers = "int8_sym" if name in ROUNDED else name.partition("_g")[0]
        others = (integers + group for group in INTEGER_GROUPS.values())
        return next((other for other in others if self.refuses(other) is None), "F16")

    def slots(self, name: str) -> tuple[Slot, ...]:
        """The tensors that the matrix takes in a format."""
        own, (rows, columns) = self.weight.name, self.weight.shape
        if name in DTYPES:
            return (Slot(own, DTYPES[name], (columns, rows) if self.weight.transposed else (rows, columns)),)
        if name in ROUNDED:
            found = (Slot(f"{own}.codes", torch.int8, (columns, rows)), Slot(f"{own}.scales", torch.float32, (rows,)))
            grid = (Slot(f"{own}.input_scale", torch.float32, ()), Slot(f"{own}.input_zero", torch.uint8, ()))
            return (*found, *grid) if isinstance(formats.get(name), StaticFormat) else found
        format_ = integer(name)
        groups = columns // format_.group
        codes = Slot(f"{own}.codes", torch.uint8, (rows, groups, format_.group * format_.num_bits // 8))
        scales = Slot(f"{own}.scales", torch.float16, (rows, groups))
        zeros = Slot(f"{own}.zeros", torch.uint8, (rows, -(-groups * format_.num_bits // 8)))
        return (codes, scales) if format_.symmetric else (codes, scales, zeros)

    def tensors(self, name: str, data: Tensor) -> dict[str, Tensor]:
        """The variant's bytes, uint8 (rows, row_bytes), as those tensors."""
        if name in DTYPES:
            values = data.clone().view(DTYPES[name])
            return {self.weight.name: values.T if self.weight.transposed else values}
        format_ = formats.get(name)
        if isinstance(format_, RoundedFormat):
            codes, scales = format_.read(data)
            grid = format_.inputs(data)
            own = [torch.tensor(grid.scale), torch.tensor(grid.zero, dtype=torch.uint8)] if isinstance(grid, Static) else []
            return {slot.name: tensor for slot, tensor in zip(self.slots(name), [codes.T, scales, *own], strict=True)}
        format_ = integer(name)
        codes, scales, zeros = format_.unpack(data)
        parts = [pack_dense(codes.unflatten(1, (-1, format_.group)), format_.num_bits), scales]
        if zeros is not None:
            padding = -zeros.shape[1] % (8 // format_.num_bits)
            parts.append(pack_fields(torch.nn.functional.pad(zeros, (0, padding)), format_.num_bits, 1))
        return {slot.name: tensor for slot, tensor in zip(self.slots(name), parts, strict=True)}

    def bytes_(self, name: str) -> int:
        """What the matrix adds to both files in a format."""
        return sum(slot.bytes_ for slot in self.slots(name)) + self.graph_bytes(name)

    def graph_bytes(self, name: str) -> int:
        """What it takes of the graph in a format: its tensors, and the nodes that it is used by."""
        from onnx import GraphProto

        part, nodes = self.part(name, {}), self.graph.by_name
        mine = dict.fromkeys(own for use in self.uses for own in (use.node, *use.transposes))
        held = [made for own in mine for made in part.instead.get(own, (nodes[own],))]
        return GraphProto(initializer=part.tensors, node=[*part.casts, *held]).ByteSize()

    def part(self, name: str, starts: Mapping[str, int]) -> Part:
        """What the matrix is in the graph, its numbers at these offsets of their file (at none where only sizes matter)."""
        tensors = [external(slot, starts.get(slot.name, 0)) for slot in self.slots(name)]
        if name == "F32":
            return Part(tuple(tensors), (), {})
        own, format_ = self.weight.name, formats.get(name)
        if isinstance(format_, CastFormat):
            tensors[0].name = f"{own}.half"
            return Part(tuple(tensors), (_cast(f"{own}.half", own),), {})
        nodes = self.graph.by_name
        instead: dict[str, tuple[NodeProto, ...]] = {name: () for use in self.uses for name in use.transposes}
        if format_.rounds:
            instead |= {use.node: self._rounding(nodes[use.node], name) for use in self.uses}
            return Part(tuple(tensors), (), instead)
        kinds = {use.kind == "Gather" for use in self.uses}
        codes = self.slots(name)[0]
        rows = Slot(f"{own}.rows", codes.dtype, (codes.shape[0], codes.shape[1] * codes.shape[2]))
        aliases = {False: tensors[0], True: external(rows, starts.get(codes.name, 0))}
        instead |= {use.node: self._reading(nodes[use.node], integer(name), aliases[use.kind == "Gather"].name) for use in self.uses}
        cast = _cast(f"{own}.scales", f"{own}.scales32")
        return Part((*(aliases[kind] for kind in sorted(kinds)), *tensors[1:]), (cast,), instead)

    def _reading(self, node: NodeProto, format_: IntegerFormat, codes: str) -> tuple[NodeProto, ...]:
        """The nodes that do with integers what `node` does with numbers."""
        own, (rows, columns) = self.weight.name, self.weight.shape
        grid = [f"{own}.scales32", *([] if format_.symmetric else [f"{own}.zeros"])]
        settings = {"bits": format_.num_bits, "block_size": format_.group}
        if node.op_type == "Gather":
            inputs = [codes, node.input[1], *grid]
            settings |= {"gather_axis": 0, "quantize_axis": 1}
            return (_node("GatherBlockQuantized", node.name, inputs, node.output[0], settings=settings),)
        bias = node.input[2] if len(node.input) > 2 else None
        product = node.output[0] if bias is None else f"{node.output[0]}.product"
        inputs = [node.input[0], codes, *grid]
        settings |= {"K": columns, "N": rows, "accuracy_level": FAST}
        made = _node("MatMulNBits", node.name, inputs, product, settings=settings)
        if bias is None:
            return (made,)
        return made, _node("Add", f"{node.name}.bias", [product, bias], node.output[0])

    def _rounding(self, node: NodeProto, name: str) -> tuple[NodeProto, ...]:
        """The nodes that round what `node` reads and multiply it."""
        own, (read, *_) = self.weight.name, node.input
        codes, scale, zero = (f"{node.output[0]}.{part}" for part in ("rounded", "scale", "zero"))
        if isinstance(formats.get(name), StaticFormat):
            scale, zero = f"{own}.input_scale", f"{own}.input_zero"
            first = _node(ROUNDING[0], f"{node.name}.rounded", [read, scale, zero], codes)
        else:
            first = _node(ROUNDING[1], f"{node.name}.rounded", [read], codes, scale, zero)
        bias = ["", node.input[2]] if len(node.input) > 2 else []
        inputs = [codes, f"{own}.codes", scale, f"{own}.scales", zero, *bias]
        return first, _node("MatMulIntegerToFloat", node.name, inputs, node.output[0])


def external(slot: Slot, offset: int) -> TensorProto:
    """A tensor of the graph whose numbers lie at an offset of the other file."""
    from onnx import StringStringEntryProto, TensorProto

    types = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
    types |= {torch.uint8: TensorProto.UINT8, torch.int8: TensorProto.INT8}
    place = {"location": NUMBERS, "offset": f"{offset:0{_OFFSET_WIDTH}}", "length": str(slot.data_bytes)}
    return TensorProto(
        name=slot.name,
        dims=slot.shape,
        data_type=types[slot.dtype],
        data_location=TensorProto.EXTERNAL,
        external_data=[StringStringEntryProto(key=key, value=value) for key, value in place.items()],
    )


@dataclass(frozen=True)
class Layout:
    """Both files of a config: the content of `model.onnx`, the tensors of the other, and what they are made of.

    `fixed` are the parameters that nobody decides about.
    """

    content: bytes
    chosen: tuple[tuple[Place, str], ...]
    fixed: tuple[Slot, ...]

    @classmethod
    def of(cls, graph: Graph, chosen: Iterable[tuple[Place, str]], fixed: Iterable[Slot]) -> Layout:
        chosen, fixed = tuple(chosen), tuple(fixed)
        slots = [*fixed, *(slot for place, name in chosen for slot in place.slots(name))]
        return cls(serialized(graph, chosen, fixed, offsets(slots)), chosen, fixed)

    @property
    def slots(self) -> list[Slot]:
        return [*self.fixed, *(slot for place, name in self.chosen for slot in place.slots(name))]

    @property
    def parameters(self) -> set[str]:
        """The names of all parameters that the graph reads."""
        return {slot.name for slot in self.fixed} | {place.weight.name for place, _ in self.chosen}

    @property
    def bytes_(self) -> int:
        return len(self.content) + EMPTY_BYTES + sum(slot.bytes_ for slot in self.slots)


def serialized(graph: Graph, chosen: Iterable[tuple[Place, str]], fixed: Iterable[Slot], starts: Mapping[str, int]) -> bytes:
    """The content of `model.onnx`, with the numbers at these offsets of the other file (at none where only sizes matter)."""
    from onnx import GraphProto, ModelProto, OperatorSetIdProto

    parts = [place.part(name, starts) for place, name in chosen]
    instead = {name: nodes for part in parts for name, nodes in part.instead.items()}
    made = GraphProto(
        node=[
            *(cast for part in parts for cast in part.casts),
            *(new for node in graph.nodes for new in instead.get(node.name, (node,))),
        ],
        initializer=[
            *graph.constants,
            *(external(slot, starts.get(slot.name, 0)) for slot in fixed),
            *(tensor for part in parts for tensor in part.tensors),
        ],
    )
    made.MergeFrom(graph.frame)
    domains = {"": graph.opset, _CONTRIB: _CONTRIB_VERSION}
    head = ModelProto(
        ir_version=_IR_VERSION,
        producer_name="anyfit",
        opset_import=[OperatorSetIdProto(domain=domain, version=version) for domain, version in domains.items()],
    )
    content = made.SerializeToString(deterministic=True)
    return head.SerializeToString(deterministic=True) + _GRAPH_FIELD + _long(len(content)) + content


def fixed_bytes(graph: Graph, places: Iterable[Place], fixed: Iterable[Slot]) -> int:
    """Bytes of `model.onnx` that belong to no matrix."""
    plain = [(place, "F32") for place in places]
    return len(serialized(graph, plain, fixed, {})) - sum(place.graph_bytes(name) for place, name in plain)


def integer(name: str) -> IntegerFormat:
    """The integer format of that name."""
    format_ = formats.get(name)
    assert isinstance(format_, IntegerFormat), name
    return format_


def _long(length: int) -> bytes:
    """A length as a protobuf's number of always the same bytes: 7 bits in each, the upper one says that more follow."""
    assert length < 2**31, length
    sevens = [length >> 7 * place & 0x7F for place in range(_LENGTH_WIDTH)]
    return bytes([*(seven | 0x80 for seven in sevens[:-1]), sevens[-1]])


def _cast(halves: str, name: str) -> NodeProto:
    from onnx import TensorProto

    return _node("Cast", f"{name}.cast", [halves], name, settings={"to": TensorProto.FLOAT})


def _node(kind: str, name: str, inputs: list[str], *outputs: str, settings: Mapping[str, int] | None = None) -> NodeProto:
    from onnx import helper

    return helper.make_node(kind, inputs, outputs, name=name, domain=_CONTRIB if kind in READERS else "", **(settings or {}))
