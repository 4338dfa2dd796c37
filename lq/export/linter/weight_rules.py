"""Rules on weights and biases."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from lq.export.graph import constant, input_at, producer, quantization_axis
from lq.export.linter.layers import is_quantized, layers, product, stored_weight, weight_dequantize
from lq.gemm import TENSOR_CORE

Found = Iterator[tuple[ir.Node, str]]


def axis(graph: ir.Graph, target: str) -> Found:
    """Yield weights whose scales run along another axis than their output channels."""
    for layer in layers(graph):
        dequantize = weight_dequantize(layer)
        given = quantization_axis(dequantize) if dequantize is not None else None
        if dequantize is None or given is None or "block_size" in dequantize.attributes:
            continue
        wanted = _output_axis(layer)
        shape = stored_weight(dequantize).shape  # type: ignore[union-attr]
        if wanted is not None and shape is not None and given % len(shape) != wanted % len(shape):
            yield dequantize, f"its scales run along axis {given}, outputs are axis {wanted}"


def _output_axis(layer: ir.Node) -> int | None:
    if layer.op_type == "Conv":
        return 0
    if layer.op_type == "ConvTranspose":
        return 1
    if producer(layer.inputs[1], "DequantizeLinear") is None:
        return None  # transposed or reshaped on the way
    return 0 if layer.attributes.get_int("transB", 0) else -1


def per_tensor(graph: ir.Graph, target: str) -> Found:
    """Yield weights with one scale for all channels."""
    for layer in layers(graph):
        dequantize, size = weight_dequantize(layer), product(layer)
        if dequantize is not None and quantization_axis(dequantize) is None and size != (1, 1):
            yield dequantize, f"the weight of {layer.op_type} has one scale for all channels"


def float_weights(graph: ir.Graph, target: str) -> Found:
    """Yield weights that are stored as floats and quantized at every start."""
    for node in graph:
        if node.op_type == "QuantizeLinear" and constant(node.inputs[0]) is not None:
            yield node, "its input is a constant, stored in float"


def quantized_bias(graph: ir.Graph, target: str) -> Found:
    """Yield int32 biases, where a target takes none."""
    for layer in layers(graph) if target == "tensorrt" else []:
        dequantize = producer(input_at(layer, 2), "DequantizeLinear")
        if dequantize is not None and constant(dequantize.inputs[0]) is not None:
            yield dequantize, "the bias is stored as integers, and TensorRT takes floats"


def small_gemm(graph: ir.Graph, target: str) -> Found:
    """Yield quantized layers too small for integer tensor cores."""
    for layer in layers(graph) if target == "tensorrt" else []:
        size = product(layer) if is_quantized(layer) else None
        if size is not None and min(size) < TENSOR_CORE:
            yield layer, f"its product is K={size[0]}, N={size[1]}, below {TENSOR_CORE}"
