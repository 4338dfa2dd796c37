"""Run 16-bit layers where there are no 16-bit kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lq.export.graph import insert_after

_16_BIT: tuple[ir.DataType | None, ...] = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def has_16_bit(model: ir.Model) -> bool:
    """Return whether a graph casts to fp16 or bf16."""
    return any(casts_to_16_bit(node) for node in model.graph)


def casts_to_16_bit(node: ir.Node) -> bool:
    """Return whether a node is a cast to fp16 or bf16."""
    return node.op_type == "Cast" and node.attributes["to"].as_int() in _16_BIT


def cast_through(model: ir.Model) -> ir.Model:
    """Return a copy that computes 16-bit layers in float32, rounding every 16-bit tensor.

    Operands and results are rounded to 16 bits, and products are summed in float32, as tensor
    cores do.
    """
    model = ir.from_proto(ir.to_proto(model))
    graph = model.graph
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _16_BIT:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(graph):
        for value in node.outputs:
            dtype = value.dtype
            if dtype is not None and dtype in _16_BIT:
                _round(graph, node, value, dtype)
    return model


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> None:
    """Put casts to a 16-bit type and back behind a value, which is a float32 one from now on."""
    narrow = node if node.op_type == "Cast" else ir.node("Cast", [value], {"to": int(dtype)})
    wide = ir.node("Cast", [narrow.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    rounded, new = wide.outputs[0], [wide] if narrow is node else [narrow, wide]
    rounded.type, rounded.shape = ir.TensorType(ir.DataType.FLOAT), value.shape
    if value.is_graph_output():
        graph.outputs[list(graph.outputs).index(value)] = rounded
        value.name, rounded.name = f"{value.name}/unrounded", value.name
    insert_after(graph, value, new)
    if narrow is not node:
        value.type = ir.TensorType(ir.DataType.FLOAT)
