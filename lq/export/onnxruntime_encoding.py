"""The same integers in the encoding that ONNX Runtime's CPU kernels are fast for.

Its kernels multiply uint8 by int8, and take in a QuantizeLinear only where it stands right behind
the layer: a Relu between them keeps the layer in float32. So activations become uint8, and
activation functions move behind the QuantizeLinear, where they clip integers.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from lq.export.graph import add_initializer, constant, producer
from lq.export.grid import pair_grid
from lq.export.passes import remove_unused

INT8_MIN = -128
CODES = (ir.DataType.INT8, ir.DataType.UINT8)
REPEATS = "lq.repeats"
"""Metadata of a QuantizeLinear whose input is on its grid already, so that it changes nothing."""


def encode_for_onnxruntime(graph: ir.Graph) -> None:
    """Store the codes of activations as uint8; what they stand for stays bit for bit the same.

    With ``Q(x) = round(x / scale)`` and an activation function that clips to ``[low, high]``:

    ``code = clip(clamp(Q(x) + z, 0, 255), Q(low) + z, Q(high) + z)``,
    ``value = (code - z) * scale``

    where the zero-point ``z`` is 0 if ``low >= 0`` and 128 otherwise. Rounding is monotone, so it
    commutes with clipping, and the clip at ``127 + z`` saturates where int8 does. Codes that are
    uint8 already need no clip where the activation function does what their range does.
    """
    for quantize in _activations(graph):
        _encode_activation(graph, quantize)
    for pool in [node for node in graph if node.op_type == "MaxPool"]:
        dequantize = producer(pool.inputs[0], "DequantizeLinear")
        if dequantize is not None and not pool.outputs[0].is_graph_output():
            _repeat_pair(graph, dequantize, pool.outputs[0])
    remove_unused(graph)


def encode_for_openvino(graph: ir.Graph) -> None:
    """Store the codes behind activation functions without negative values as uint8, bit for bit.

    OpenVINO itself gives int8 codes a zero-point of 128, for which its convolutions then have to
    correct every padded edge; with 0 they have not.
    """
    for quantize in _activations(graph):
        if _clipped(quantize)[1] >= 0:
            _encode_activation(graph, quantize)
    remove_unused(graph)


def _activations(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes that quantize a tensor to 8 bits with one scale and zero-point 0."""
    grids = {node: pair_grid(node) for node in graph if node.op_type == "QuantizeLinear"}
    return [n for n, grid in grids.items() if grid and grid.dtype in CODES and not grid.zero_point]


def _repeat_pair(graph: ir.Graph, dequantize: ir.Node, value: ir.Value) -> None:
    """Quantize what max-pooling picks from quantized numbers once more, which changes none.

    ONNX Runtime pools integers only between Q/DQ, and multiplies integers only behind them.
    """
    readers = [use for use in value.uses() if use[0].op_type != "QuantizeLinear"]
    if not readers:
        return
    name, encoding = f"{value.producer().name}/repeated", dequantize.inputs[1:]  # type: ignore[union-attr]
    quantize = ir.node("QuantizeLinear", [value, *encoding], name=name)
    pair = ir.node(
        "DequantizeLinear", [quantize.outputs[0], *encoding], name=f"{name}/DequantizeLinear"
    )
    quantize.metadata_props[REPEATS] = "1"
    for node, dtype in ((quantize, ir.DataType.UINT8), (pair, ir.DataType.FLOAT)):
        output = node.outputs[0]
        output.name, output.type = f"{node.name}/out", ir.TensorType(dtype)
        output.shape = value.shape
    graph.insert_after(value.producer(), [quantize, pair])  # type: ignore[arg-type]
    for node, index in readers:
        node.replace_input_with(index, pair.outputs[0])


def _encode_activation(graph: ir.Graph, quantize: ir.Node) -> None:
    before, low, high = _clipped(quantize)
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


def _clipped(quantize: ir.Node) -> tuple[ir.Value | None, int, int]:
    """Return what is clipped and then quantized, and the smallest and the largest code of it."""
    value, grid = quantize.inputs[0], pair_grid(quantize)
    assert grid is not None
    limits = np.iinfo(grid.dtype.numpy())
    activation = producer(value, "Relu", "Clip")
    if value is None or activation is None or not _only_quantized(value):
        return value, limits.min, limits.max
    codes = np.rint(np.array(_bounds(activation), np.float32) / np.float32(grid.scale))
    low, high = codes.clip(limits.min, limits.max).astype(int)
    return activation.inputs[0], int(low), int(high)


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


ENCODINGS = {"onnxruntime": encode_for_onnxruntime, "openvino": encode_for_openvino}
"""Target -> what is done to the graph for it."""
