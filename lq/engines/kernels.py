"""What ONNX Runtime's integer kernels want of biases and weights, put into the graph they run."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lq.export.graph import WEIGHTED, add_initializer, constant, producer
from lq.export.grid import grid_of

MAX_BIAS_CODE = 2**30
"""Largest bias in steps of the accumulator, an int32 that has to hold the whole sum."""


def encode_biases(graph: ir.Graph) -> bool:
    """Store the biases of quantized layers as int32, and return whether there are any.

    ``code = round(bias / (input_scale * weight_scale))``

    which is at most half a step from the bias.
    """
    found = False
    for layer in [node for node in graph if node.op_type in ("Conv", "Gemm")]:
        grid = grid_of(layer.inputs[0])  # through what moves integers, as the kernels are fused
        weight = producer(layer.inputs[1], "DequantizeLinear")
        bias = constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
        if grid is None or weight is None or bias is None:
            continue
        if _is_plain(layer) and weight.attributes.get_int("axis", 1) == 0:
            found |= _encode_bias(graph, layer, weight, np.float32(grid.scale), bias)
    return found


def encode_weights_unsigned(graph: ir.Graph) -> None:
    """Store int8 weights as uint8 with zero-point 128: they stand for the same numbers.

    Products of uint8 by uint8 take kernels with 32-bit sums, which do not saturate where there is
    no VNNI.
    """
    for node in list(graph):
        weight = producer(node.inputs[1], "DequantizeLinear") if node.op_type in WEIGHTED else None
        codes = constant(weight.inputs[0]) if weight is not None else None
        if weight is None or codes is None or codes.dtype != np.int8:
            continue
        name, scale = str(weight.name), constant(weight.inputs[1])
        assert scale is not None
        shifted = (codes.astype(np.int16) + 128).astype(np.uint8)
        zero_point = np.full(scale.shape, 128, np.uint8)
        weight.replace_input_with(0, add_initializer(graph, f"{name}.uint8", shifted))
        weight.resize_inputs(3)
        weight.replace_input_with(2, add_initializer(graph, f"{name}.zero_point", zero_point))


def _is_plain(layer: ir.Node) -> bool:
    """Return whether a layer adds its bias as it is, and its first weight axis is the output's."""
    attributes = layer.attributes
    return layer.op_type == "Conv" or (
        attributes.get_int("transB", 0) == 1
        and attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
    )


def _encode_bias(
    graph: ir.Graph, layer: ir.Node, weight: ir.Node, input_scale: np.float32, bias: np.ndarray
) -> bool:
    scale, codes = constant(weight.inputs[1]), constant(weight.inputs[0])
    if scale is None or codes is None or codes.dtype != np.int8:
        return False
    scale = np.broadcast_to(scale, bias.shape)
    needed = _scale_that_holds(bias, input_scale, scale)
    if (needed > scale).any():
        if len(weight.outputs[0].uses()) > 1:
            return False  # another layer counts on the weight as it is
        along = [-1] + [1] * (codes.ndim - 1)
        codes = np.rint(codes * (scale / needed).reshape(along)).astype(np.int8)
        scale = needed
        weight = _dequantized(graph, f"{layer.name}.weight.widened", codes, scale)
        graph.insert_before(layer, weight)
        layer.replace_input_with(1, weight.outputs[0])
    step = (input_scale * scale).astype(np.float32)
    stored = _dequantized(graph, f"{layer.name}.bias", np.rint(bias / step).astype(np.int32), step)
    graph.insert_before(layer, stored)
    layer.replace_input_with(2, stored.outputs[0])
    return True


def _scale_that_holds(bias: np.ndarray, input_scale: np.float32, scale: np.ndarray) -> np.ndarray:
    """Return weight scales in whose steps a bias fits an int32.

    A channel whose weights are next to nothing has a step so small that its bias does not fit;
    with the larger scale its weights, which do not count beside the bias, round to fewer codes.
    """
    needed = np.abs(bias) / (input_scale * np.float32(MAX_BIAS_CODE))
    held: np.ndarray = np.maximum(scale, needed).astype(np.float32)
    return held


def _dequantized(graph: ir.Graph, name: str, codes: np.ndarray, scale: np.ndarray) -> ir.Node:
    inputs = [
        add_initializer(graph, f"{name}.{codes.dtype}", codes),
        add_initializer(graph, f"{name}.scale", scale),
    ]
    node = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{name}/DequantizeLinear")
    node.outputs[0].name = f"{node.name}/out"
    return node
