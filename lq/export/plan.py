"""Read the format of every layer back from an exported graph."""

from __future__ import annotations

import onnx_ir as ir

from lq.export.passes import WEIGHTED

_FLOATS = {
    ir.DataType.FLOAT: "fp32",
    ir.DataType.FLOAT16: "fp16",
    ir.DataType.BFLOAT16: "bf16",
}
_INTEGERS = {
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
    if source is not None and source.op_type == "Transpose":
        return _format(source.inputs[0])
    if source is not None and source.op_type == "DequantizeLinear":
        codes = source.inputs[0]
        assert codes is not None
        # QuantizeLinear's type is that of its zero-point.
        quantize = codes.producer()
        stored = codes if quantize is None else quantize.inputs[2]
        return _INTEGERS.get(_dtype(stored), "unknown")
    return _FLOATS.get(_dtype(value), "fp32")


def _dtype(value: ir.Value | None) -> ir.DataType:
    if value is not None and value.const_value is not None:
        return value.const_value.dtype
    if value is not None and value.producer() is not None:
        node = value.producer()
        assert node is not None
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int())
        if node.op_type == "Constant":
            return ir.convenience.get_const_tensor(value).dtype  # type: ignore[union-attr]
    return value.dtype if value is not None and value.dtype is not None else ir.DataType.FLOAT
