"""Graphs whose matrices round what they read: the same without rounding, and each product by itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from anyfit.targets.onnx_file import ROUNDING

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

PRODUCT = "MatMulIntegerToFloat"


def products(graph: GraphProto) -> dict[str, tuple[str, NodeProto]]:
    """What is read before it is rounded, and the node that multiplies it, by the name of what comes out."""
    read = {node.output[0]: node.input[0] for node in graph.node if node.op_type in ROUNDING}
    return {node.output[0]: (read[node.input[0]], node) for node in graph.node if node.op_type == PRODUCT}


def without_rounding(graph: GraphProto) -> None:
    """Have every product multiply what is read as it is, in float32, in place."""
    found = products(graph)
    nodes = [made for node in graph.node if node.op_type not in ROUNDING for made in _plain(node, found)]
    del graph.node[:]
    graph.node.extend(nodes)


def watched(model: ModelProto) -> dict[str, tuple[str, NodeProto]]:
    """Have the graph also give what each product reads and makes, in place; the products."""
    from onnx import ValueInfoProto

    found, given = products(model.graph), {output.name for output in model.graph.output}
    for name in dict.fromkeys([*(read for read, _ in found.values()), *found]):
        if name not in given:
            model.graph.output.append(ValueInfoProto(name=name))
    return found


def _plain(node: NodeProto, found: dict[str, tuple[str, NodeProto]]) -> Iterator[NodeProto]:
    from onnx import TensorProto, helper

    if node.op_type != PRODUCT:
        yield node
        return
    (output,), (read, _), matrix = node.output, found[node.output[0]], f"{node.output[0]}.matrix"
    bias = node.input[6] if len(node.input) > 6 else None
    # Not by DequantizeLinear: ONNX Runtime makes of that and a product one that rounds what it reads.
    yield helper.make_node("Cast", [node.input[1]], [f"{matrix}.codes"], to=TensorProto.FLOAT)
    yield helper.make_node("Mul", [f"{matrix}.codes", node.input[3]], [matrix])
    yield helper.make_node("MatMul", [read, matrix], [output if bias is None else f"{output}.product"])
    if bias is not None:
        yield helper.make_node("Add", [f"{output}.product", bias], [output])
