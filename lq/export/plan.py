"""Read the format of every layer back from an exported graph."""

from __future__ import annotations

import onnx_ir as ir

from lq.export.graph import WEIGHTED
from lq.export.grid import code_type, passed_on

_FLOATS = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
}
_CODES = {
    ir.DataType.INT8: "int8",
    ir.DataType.UINT8: "int8",
    ir.DataType.INT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8_e4m3",
}


def read_plan(model: ir.Model) -> dict[str, str]:
    """Return layer -> format of a graph, by the types of what each layer multiplies.

    A layer whose weight and input have different formats is told as ``weights/inputs``:
    ``int8/fp32`` for weight-only quantization.
    """
    plan = {}
    for node in model.graph:
        if node.op_type in WEIGHTED:
            weight, input = _format(node.inputs[1]), _format(node.inputs[0])
            plan[str(node.name)] = weight if weight == input else f"{weight}/{input}"
    return plan


def _format(value: ir.Value | None) -> str:
    assert value is not None
    source = value.producer()
    if source is not None and source.op_type == "DequantizeLinear":
        dtype = code_type(source)
        return _CODES.get(dtype, "unknown") if dtype is not None else "unknown"
    formats = {_format(x) for x in passed_on(source)} if source is not None else set()
    if formats:
        return formats.pop() if len(formats) == 1 else "fp32"
    return _FLOATS.get(_dtype(value), "fp32")


def _dtype(value: ir.Value) -> ir.DataType:
    tensor = ir.convenience.get_const_tensor(value)
    if tensor is not None:
        return tensor.dtype
    node = value.producer()
    if node is not None and node.op_type == "Cast":
        return ir.DataType(node.attributes["to"].as_int())
    return value.dtype if value.dtype is not None else ir.DataType.FLOAT
