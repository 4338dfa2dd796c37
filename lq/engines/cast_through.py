"""Run 16-bit layers where there are no 16-bit kernels."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

_16_BIT: tuple[ir.DataType | None, ...] = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def has_16_bit(model: ir.Model) -> bool:
    """Return whether a graph casts to fp16 or bf16."""
    return any(_casts_to(node) in _16_BIT for node in model.graph)


def _casts_to(node: ir.Node) -> ir.DataType | None:
    return ir.DataType(node.attributes["to"].as_int()) if node.op_type == "Cast" else None


def cast_through(model: ir.Model) -> ir.Model:
    """Return a copy that computes 16-bit layers in float32, rounding where the graph casts.

    Operands and results are rounded to 16 bits, and products are summed in float32, as tensor
    cores do.
    """
    model = ir.from_proto(ir.to_proto(model))
    graph = model.graph
    types = {value: value.dtype for node in graph for value in node.outputs}
    for name, value in graph.initializers.items():
        tensor = value.const_value
        if tensor is not None and tensor.dtype in _16_BIT:
            value.const_value = ir.tensor(tensor.numpy().astype(np.float32), name=name)
            value.type = ir.TensorType(ir.DataType.FLOAT)
    for node in list(graph):
        to = _casts_to(node)
        if to in _16_BIT:
            _round_after(graph, node)
        elif to is ir.DataType.FLOAT and node.inputs[0] in types:
            before = types[node.inputs[0]]
            if before is not None and before in _16_BIT:
                _round_before(graph, node, before)
    for node in graph:
        for value in node.outputs:
            if value.dtype in _16_BIT and _casts_to(node) not in _16_BIT:
                value.type = ir.TensorType(ir.DataType.FLOAT)
    return model


def _round_after(graph: ir.Graph, cast: ir.Node) -> None:
    back = ir.node("Cast", [cast.outputs[0]], {"to": int(ir.DataType.FLOAT)})
    cast.outputs[0].replace_all_uses_with(back.outputs[0])
    back.replace_input_with(0, cast.outputs[0])
    graph.insert_after(cast, back)


def _round_before(graph: ir.Graph, cast: ir.Node, dtype: ir.DataType) -> None:
    rounding = ir.node("Cast", [cast.inputs[0]], {"to": int(dtype)})
    graph.insert_before(cast, rounding)
    cast.replace_input_with(0, rounding.outputs[0])
