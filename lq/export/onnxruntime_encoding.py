"""The same integers in the encoding that ONNX Runtime's CPU kernels are fast for.

Its kernels multiply uint8 by int8 and add an int32 bias, and they take in a QuantizeLinear only
where it stands right behind the layer: a Relu between them keeps the layer in float32. So
activations become uint8, biases int32, and activation functions move behind the QuantizeLinear,
where they clip integers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lq.export.passes import add_initializer, constant, producer, remove_unused

INT8_MIN, INT8_MAX = -128, 127
MAX_BIAS_CODE = 2**30
"""Largest magnitude of a bias in steps of the accumulator, an int32 that has to hold the sum too."""


def encode_for_onnxruntime(graph: ir.Graph) -> None:
    """Re-encode a graph with int8 Q/DQ for ONNX Runtime, in place."""
    encode_activations(graph)
    encode_biases(graph)
    remove_unused(graph)


def encode_activations(graph: ir.Graph) -> None:
    """Store the codes of activations as uint8; what they stand for stays bit for bit the same.

    With ``Q(x) = round(x / scale)`` and an activation function that clips to ``[low, high]``:

    ``code = clip(clamp(Q(x) + z, 0, 255), Q(low) + z, Q(high) + z)``, ``value = (code - z) * scale``

    where the zero-point ``z`` is 0 if ``low >= 0`` and 128 otherwise. Rounding is monotone, so it
    commutes with clipping, and the clip at ``127 + z`` saturates where int8 does.
    """
    for quantize in [node for node in graph if node.op_type == "QuantizeLinear"]:
        scale, zero_point = constant(quantize.inputs[1]), constant(quantize.inputs[2])
        if zero_point is not None and zero_point.dtype == np.int8 and zero_point.ndim == 0:
            assert scale is not None
            _encode_activation(graph, quantize, scale)


def _encode_activation(graph: ir.Graph, quantize: ir.Node, scale: np.ndarray) -> None:
    before, low, high = _clipped(quantize.inputs[0], scale)
    zero = 0 if low >= 0 else -INT8_MIN
    codes, readers = quantize.outputs[0], list(quantize.outputs[0].uses())
    quantize.replace_input_with(0, before)
    for node in (quantize, *(reader for reader, _ in readers)):
        node.replace_input_with(2, _byte(graph, zero))
    codes.type = ir.TensorType(ir.DataType.UINT8)
    if (low + zero, high + zero) == (0, 255):
        return
    bounds = [_byte(graph, low + zero), _byte(graph, high + zero)]
    clip = ir.node("Clip", [codes, *bounds], name=f"{quantize.name}/Clip")
    clip.outputs[0].name = f"{clip.name}/out"
    clip.outputs[0].type, clip.outputs[0].shape = codes.type, codes.shape
    graph.insert_after(quantize, clip)
    for reader, index in readers:
        reader.replace_input_with(index, clip.outputs[0])


def _clipped(value: ir.Value | None, scale: np.ndarray) -> tuple[ir.Value | None, int, int]:
    """Return what an activation function clips, and the codes of its bounds."""
    activation = producer(value, "Relu") or producer(value, "Clip")
    if value is None or activation is None or not _only_quantized(value):
        return value, INT8_MIN, INT8_MAX
    low, high = _bounds(activation)
    codes = np.rint(np.float32([low, high]) / scale).clip(INT8_MIN, INT8_MAX)
    return activation.inputs[0], int(codes[0]), int(codes[1])


def _only_quantized(value: ir.Value) -> bool:
    quantized = all(node.op_type == "QuantizeLinear" for node, _ in value.uses())
    return quantized and not value.is_graph_output()


def _bounds(activation: ir.Node) -> tuple[float, float]:
    if activation.op_type == "Relu":
        return 0.0, np.inf
    given = [constant(value) for value in activation.inputs[1:3]] + [None, None]
    low, high = (
        default if bound is None else float(bound)
        for bound, default in zip(given, (-np.inf, np.inf), strict=False)
    )
    return low, high


def _byte(graph: ir.Graph, value: int) -> ir.Value:
    """Return the constant of that value, which all who need it share."""
    name = f"uint8.{value}"
    if name in graph.initializers:
        return graph.initializers[name]
    return add_initializer(graph, name, np.array(value, np.uint8))


def encode_biases(graph: ir.Graph) -> None:
    """Store the biases of quantized layers as int32, in steps of the accumulator.

    ``code = round(bias / (input_scale * weight_scale))``

    which is at most half a step from the bias. ONNX Runtime rounds them so by itself, but not in
    a graph that also has float layers, where that rewrite is off (see ``rewrites_plan``).
    """
    for layer in [node for node in graph if node.op_type in ("Conv", "Gemm")]:
        input = producer(layer.inputs[0], "DequantizeLinear")
        weight = producer(layer.inputs[1], "DequantizeLinear")
        bias = constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
        if input is not None and weight is not None and bias is not None and _is_plain(layer):
            _encode_bias(graph, layer, (input, weight), bias)


def _is_plain(layer: ir.Node) -> bool:
    """Return whether a layer adds its bias as it is, and its first weight axis is the output's."""
    attributes = layer.attributes
    return layer.op_type == "Conv" or (
        attributes.get_int("transB", 0) == 1
        and attributes.get_float("alpha", 1.0) == attributes.get_float("beta", 1.0) == 1.0
    )


def _encode_bias(
    graph: ir.Graph, layer: ir.Node, operands: tuple[ir.Node, ir.Node], bias: np.ndarray
) -> None:
    input, weight = operands
    input_scale, scale = constant(input.inputs[1]), constant(weight.inputs[1])
    codes = constant(weight.inputs[0])
    if input_scale is None or scale is None or codes is None or codes.dtype != np.int8:
        return
    scale = np.broadcast_to(scale, bias.shape)
    needed = _scale_that_holds(bias, input_scale, scale)
    if (needed > scale).any():
        if len(weight.outputs[0].uses()) > 1:
            return  # another layer counts on the weight as it is
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


def _scale_that_holds(bias: np.ndarray, input_scale: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return weight scales in whose steps a bias fits an int32.

    A channel whose weights are next to nothing has a step so small that its bias does not fit;
    with the larger scale its weights, which do not count beside the bias, round to fewer codes.
    """
    needed = np.abs(bias) / (input_scale * np.float32(MAX_BIAS_CODE))
    return np.maximum(scale, needed).astype(np.float32)


def _dequantized(graph: ir.Graph, name: str, codes: np.ndarray, scale: np.ndarray) -> ir.Node:
    inputs = [
        add_initializer(graph, f"{name}.{codes.dtype}", codes),
        add_initializer(graph, f"{name}.scale", scale),
    ]
    node = ir.node("DequantizeLinear", inputs, {"axis": 0}, name=f"{name}/DequantizeLinear")
    node.outputs[0].name = f"{node.name}/out"
    return node
