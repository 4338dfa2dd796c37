"""BatchNorm folded into the scales of the weights before it."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lq.export.graph import (
    WEIGHTED,
    add_initializer,
    along,
    constant,
    input_at,
    only_feeds,
    producer,
)
from lq.export.passes.naming import OUTPUT_OF, scope


def fold_batchnorm(graph: ir.Graph) -> None:
    """Fold BatchNorm into the quantized layer before it, without touching its integers.

    With ``factor = gamma / sqrt(variance + eps)`` per output channel:

    ``scale' = scale * |factor|``, ``integers' = integers * sign(factor)``,
    ``bias' = beta + (bias - mean) * factor``

    A factor of zero gives integers of zero and keeps the scale, which must be positive.
    """
    for norm in [n for n in graph if n.op_type == "BatchNormalization"]:
        layer = producer(norm.inputs[0], *WEIGHTED)
        if layer is None or not only_feeds(layer.outputs[0], norm):
            continue
        dequantize = producer(layer.inputs[1], "DequantizeLinear")
        if dequantize is None or not _has_channel_axis(layer):
            continue
        _fold(graph, layer, dequantize, norm)


def _has_channel_axis(layer: ir.Node) -> bool:
    """Return whether the weight's output channels are those of the layer's output, in order."""
    if layer.op_type == "ConvTranspose":
        return layer.attributes.get_int("group", 1) == 1
    if layer.op_type == "Gemm":
        return layer.attributes.get_int("transB", 0) == 1
    return layer.op_type == "Conv"


def _fold(graph: ir.Graph, layer: ir.Node, dequantize: ir.Node, norm: ir.Node) -> None:
    gamma, beta, mean, variance = (
        np.asarray(constant(value), dtype=np.float64) for value in norm.inputs[1:5]
    )
    factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    bias = constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
    bias = beta + ((0.0 if bias is None else bias) - mean) * factor

    name = scope(layer)
    layer.replace_input_with(1, _scaled(graph, layer, dequantize, factor))
    layer.resize_inputs(3)
    bias = bias.astype(np.float32)
    layer.replace_input_with(2, add_initializer(graph, f"{name}.bias.folded", bias))
    layer.metadata_props[OUTPUT_OF] = _output_of(norm)
    norm.outputs[0].replace_all_uses_with(layer.outputs[0], replace_graph_outputs=True)
    graph.remove(norm, safe=True)


def _output_of(norm: ir.Node) -> str:
    """Return the module whose output a BatchNorm computes; none where one has its activation too.

    timm's ``BatchNormAct2d`` is such a module.
    """
    module = scope(norm)
    inside = any(scope(user).startswith(f"{module}.") for user, _ in norm.outputs[0].uses())
    return f"{module}/{norm.op_type}" if inside else module


def _scaled(graph: ir.Graph, layer: ir.Node, dequantize: ir.Node, factor: np.ndarray) -> ir.Value:
    """Return a layer's weight times a factor per output channel."""
    codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    assert codes is not None
    assert scale is not None
    scale = np.broadcast_to(scale, factor.shape)
    folded = (scale * np.abs(factor)).astype(np.float32)
    zero = folded < np.finfo(np.float32).tiny
    sign = along(np.where(zero, 0, np.sign(factor)), axis := _channel_axis(layer), codes.ndim)
    signed = (codes.astype(np.float32) * sign).astype(codes.dtype)
    stored = ir.DataType.from_numpy(codes.dtype).name.lower()
    name, zero_point = f"{scope(layer)}.weight", input_at(dequantize, 2)
    if zero_point is None or zero_point.shape != factor.shape:  # one scale for all channels
        zeros = np.zeros(factor.shape, codes.dtype)
        zero_point = add_initializer(graph, f"{name}.zero_point", zeros)
    inputs = [
        add_initializer(graph, f"{name}.{stored}", signed),
        add_initializer(graph, f"{name}.scale", np.where(zero, scale, folded)),
        zero_point,
    ]
    new = ir.node("DequantizeLinear", inputs, {"axis": axis}, version=dequantize.version)
    new.metadata_props.update(dequantize.metadata_props)
    graph.insert_before(layer, new)
    return new.outputs[0]


def _channel_axis(layer: ir.Node) -> int:
    return 1 if layer.op_type == "ConvTranspose" else 0
