"""Weights stored as the codes that fake-quantize computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lq.export.graph import (
    WEIGHTED,
    add_initializer,
    along,
    constant,
    input_at,
    producer,
    quantization_axis,
)

_LIMITS = {
    ir.DataType.INT4: (-8, 7),
    ir.DataType.UINT4: (0, 15),
    ir.DataType.INT8: (-128, 127),
    ir.DataType.UINT8: (0, 255),
    ir.DataType.INT16: (-32768, 32767),
    ir.DataType.UINT16: (0, 65535),
    ir.DataType.FLOAT8E4M3FN: (-448, 448),
}
"""Type -> smallest and largest code."""


def store_integer_weights(graph: ir.Graph, narrow: bool = True) -> list[ir.Node]:
    """Replace each float weight behind QuantizeLinear by its codes, and return those nodes.

    ``codes = clamp(round_half_even(weight / scale) + zero_point, qmin, qmax)``

    These are the codes that fake-quantize computes: both divide in float32. int4 is packed two to
    a byte; float8 is rounded to the nearest float8 number.

    Args:
        graph: The graph.
        narrow: Drop the lowest code of signed integers, as recipes do for weights: QuantizeLinear
            has no such range. ``False`` stores what the node computes.
    """
    stored = [node for node in graph if _is_float_weight(node)]
    for node in stored:
        weight = node.inputs[0]
        assert weight is not None
        codes = _codes(node, narrow)
        name = f"{weight.name}.{ir.DataType.from_numpy(codes.dtype).name.lower()}"
        node.outputs[0].replace_all_uses_with(add_initializer(graph, name, codes))
        graph.remove(node, safe=True)
    return stored


def _is_float_weight(node: ir.Node) -> bool:
    value = input_at(node, 0)
    if node.op_type != "QuantizeLinear" or value is None or not value.is_initializer():
        return False
    return constant(node.inputs[1]) is not None and _code_type(node) in _LIMITS


def _code_type(node: ir.Node) -> ir.DataType | None:
    zero_point = input_at(node, 2)
    if zero_point is None:
        return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
    return zero_point.dtype


def _codes(node: ir.Node, narrow: bool) -> np.ndarray:
    array, scale, zero_point = (constant(input_at(node, i)) for i in range(3))
    assert array is not None
    assert scale is not None
    dtype = _code_type(node)
    assert dtype is not None
    low, high = _LIMITS[dtype]
    axis = quantization_axis(node)
    codes = array / along(scale, axis, array.ndim)
    if dtype is not ir.DataType.FLOAT8E4M3FN:
        codes = np.rint(codes)
        low = -high if narrow and low < 0 else low
        if zero_point is not None and zero_point.any():
            codes += along(zero_point.astype(np.float32), axis, array.ndim)
    clipped: np.ndarray = codes.clip(low, high).astype(dtype.numpy())
    return clipped


def fold_biases(graph: ir.Graph) -> list[ir.Node]:
    """Store biases that are integers behind DequantizeLinear in float, and return those nodes.

    ``bias = codes * scale``, in float32 as the node computes it.
    """
    folded = []
    for layer in [node for node in graph if node.op_type in WEIGHTED]:
        dequantize = producer(input_at(layer, 2), "DequantizeLinear")
        codes = constant(dequantize.inputs[0]) if dequantize is not None else None
        scale = constant(dequantize.inputs[1]) if dequantize is not None else None
        if dequantize is None or codes is None or scale is None:
            continue
        bias = codes.astype(np.float32) * scale
        value = add_initializer(graph, f"{dequantize.outputs[0].name}.float", bias)
        layer.replace_input_with(2, value)
        folded.append(dequantize)
    return folded
