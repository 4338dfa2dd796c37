"""16-bit layers that follow each other stay in 16 bits; every move is exact."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lq.export.graph import add_initializer, constant, insert_after, producer, users
from lq.export.grid import MOVES

_16_BIT = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_MONOTONE = (*MOVES, "Relu", "MaxPool", "Concat", "Clip")
"""Commute with rounding: they pick elements, or clip to bounds that 16 bits hold."""
_ROUNDED_ONCE = ("Add", "Sub", "Mul", "BatchNormalization")
"""Rounded to 16 bits they are the 16-bit operator. The sum of two fp16 numbers rounded to float32
and then to fp16 is their sum rounded once: float32 has 24 >= 2 * 11 + 2 bits (Figueroa 1995).
BatchNormalization keeps float32 parameters, and its arithmetic with them."""


def fold_weight_casts(graph: ir.Graph) -> None:
    """Store the weights of 16-bit layers in 16 bits, instead of casting them at every run."""
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Cast" else None
        if weight is None or not weight.is_initializer() or weight.const_value is None:
            continue
        dtype = ir.DataType(node.attributes["to"].as_int())
        array = weight.const_value.numpy().astype(dtype.numpy())
        folded = add_initializer(graph, f"{weight.name}.{dtype.name.lower()}", array)
        node.outputs[0].replace_all_uses_with(folded)
        graph.remove(node, safe=True)


def delay_upcasts(graph: ir.Graph) -> None:
    """Move casts from 16 bits to float32 behind operators that compute the same in 16 bits.

    ``relu(float32(x)) = float32(relu(x))``; a sum only where all that reads it rounds it anyway.
    """
    for node in list(graph):
        dtype = _narrow_type(node)
        if dtype is None or node.outputs[0].is_graph_output():
            continue
        if node.op_type in _MONOTONE or _is_rounded(node.outputs[0], dtype):
            _narrow(graph, node, dtype)


def _narrow_type(node: ir.Node) -> ir.DataType | None:
    """Return the 16-bit type that all inputs of a node are cast up from, if it can run in it."""
    if node.op_type not in (*_MONOTONE, *_ROUNDED_ONCE) or len(node.outputs) != 1:
        return None
    types = {_upcast_from(value) for value in _data(node)}
    dtype = types.pop() if len(types) == 1 else None
    return dtype if dtype is not None and _bounds_fit(node, dtype) else None


def _data(node: ir.Node) -> list[ir.Value | None]:
    several = node.op_type in ("Concat", "Add", "Sub", "Mul")
    return list(node.inputs if several else node.inputs[:1])


def _upcast_from(value: ir.Value | None) -> ir.DataType | None:
    cast = producer(value, "Cast")
    source = cast.inputs[0] if cast is not None else None
    if cast is None or source is None or cast.attributes["to"].as_int() != ir.DataType.FLOAT:
        return None
    dtype = source.dtype
    return dtype if dtype in _16_BIT else None


def _bounds_fit(node: ir.Node, dtype: ir.DataType) -> bool:
    bounds = [constant(value) for value in node.inputs[1:]] if node.op_type == "Clip" else []
    return all(b is not None and b == b.astype(dtype.numpy()).astype(b.dtype) for b in bounds)


def _is_rounded(value: ir.Value, dtype: ir.DataType) -> bool:
    """Return whether all that reads a value rounds it to a type, first or behind monotone nodes."""
    if value.is_graph_output() or not users(value):
        return False
    return all(
        (node.op_type == "Cast" and node.attributes["to"].as_int() == dtype)
        or (
            node.op_type in _MONOTONE
            and len(node.outputs) == 1
            and _bounds_fit(node, dtype)
            and _is_rounded(node.outputs[0], dtype)
        )
        for node in users(value)
    )


def _narrow(graph: ir.Graph, node: ir.Node, dtype: ir.DataType) -> None:
    for index, value in enumerate(_data(node)):
        cast = producer(value, "Cast")
        assert cast is not None
        node.replace_input_with(index, cast.inputs[0])
    if node.op_type == "Clip":
        _narrow_bounds(graph, node, dtype)
    output = node.outputs[0]
    output.type = ir.TensorType(dtype)
    cast = ir.node("Cast", [output], {"to": int(ir.DataType.FLOAT)}, version=node.version)
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), output.shape
    insert_after(graph, output, [cast])


def _narrow_bounds(graph: ir.Graph, clip: ir.Node, dtype: ir.DataType) -> None:
    for index, bound in list(enumerate(clip.inputs))[1:]:
        number = constant(bound)
        assert number is not None
        assert bound is not None
        array = np.asarray(number, dtype.numpy())
        stored = add_initializer(graph, f"{bound.name}.{dtype.name.lower()}", array)
        clip.replace_input_with(index, stored)


def cancel_casts(graph: ir.Graph) -> None:
    """Remove casts of what has just been cast up from the type they cast to."""
    for node in list(graph):
        if node.op_type != "Cast" or node.outputs[0].is_graph_output():
            continue
        if _upcast_from(node.inputs[0]) == node.attributes["to"].as_int():
            up = producer(node.inputs[0], "Cast")
            source = up.inputs[0] if up is not None else None
            assert source is not None
            node.outputs[0].replace_all_uses_with(source)
            graph.remove(node, safe=True)
