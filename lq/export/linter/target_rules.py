"""Rules on what a target can run."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from lq.export.graph import constant, input_at, producer
from lq.export.grid import code_type
from lq.export.linter.layers import is_computed

Found = Iterator[tuple[ir.Node, str]]
CODES: dict[str, frozenset[str]] = {
    "tensorrt": frozenset({"INT8", "INT4", "FLOAT8E4M3FN", "FLOAT4E2M1"}),
    "onnxruntime": frozenset({"INT8", "UINT8", "INT4", "UINT4", "INT16", "UINT16", "INT32"}),
    "openvino": frozenset({"INT8", "UINT8", "INT4", "UINT4", "INT32"}),
}
"""Target -> types of codes it computes with, or stores weights in. A new target is a row here."""
INTEGER_OPERATORS = (
    "QLinearConv",
    "QLinearMatMul",
    "ConvInteger",
    "MatMulInteger",
    "DynamicQuantizeLinear",
)


def zero_point(graph: ir.Graph, target: str) -> Found:
    """Yield quantizers with a zero-point, where a target has none."""
    for node in graph if target == "tensorrt" else []:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = constant(input_at(node, 2))
        pair_told = producer(node.inputs[0], "QuantizeLinear") is not None
        if zero is not None and zero.astype(float).any() and not pair_told:
            yield node, "its zero-point is not 0"


def formats(graph: ir.Graph, target: str) -> Found:
    """Yield nodes in formats that a target cannot run."""
    for node in graph:
        if node.op_type in INTEGER_OPERATORS and target != "onnxruntime":
            yield node, f"{target} has no {node.op_type}"
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if node.domain == "com.microsoft" and target != "onnxruntime":
            yield node, f"{target} reads Q/DQ of ONNX, not of com.microsoft"
        dtype = code_type(node)
        is_bias = dtype is ir.DataType.INT32 and not is_computed(node.outputs[0])
        starts = node.op_type == "QuantizeLinear" or constant(node.inputs[0]) is not None
        if starts and dtype is not None and dtype.name not in CODES[target] and not is_bias:
            yield node, f"{target} does not compute with {dtype.name.lower()}"
