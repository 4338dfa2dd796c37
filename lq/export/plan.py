"""Read the format of every layer back from an exported graph."""

from __future__ import annotations

import onnx_ir as ir

from lq.export.graph import WEIGHTED, constant, producer
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
    ir.DataType.UINT4: "int4",
    ir.DataType.FLOAT8E4M3FN: "fp8_e4m3",
}
_ON_THE_WAY = ("Transpose", "Reshape", "Cast", "QuantizeLinear", "DequantizeLinear")
"""What lies between the constant that a weight comes from and where it is multiplied."""


def read_plan(model: ir.Model) -> dict[str, str]:
    """Return layer -> format of a graph, by the types of what each layer multiplies.

    A layer whose weight and input have different formats is told as ``weights/inputs``:
    ``int8/fp32`` for weight-only quantization. Weights that are plain floats say it alone: they
    are multiplied in their own format, also by what has been dequantized.
    """
    return {str(node.name): node_format(node) for node in model.graph if node.op_type in WEIGHTED}


def node_format(node: ir.Node) -> str:
    """Return the format of a node that multiplies, as ``read_plan`` tells it."""
    weight, input = _weight_format(node.inputs[1]), _format(node.inputs[0])
    alone = weight == input or weight in _FLOATS.values()
    return weight if alone else f"{weight}/{input}"


def read_layers(model: ir.Model) -> dict[str, str]:
    """Return layer -> format of a graph, for the layers that multiply by a weight.

    A layer called several times is one layer; the products of attention are none.

    Raises:
        ValueError: If the calls of a layer have different formats, which no recipe gives.
    """
    found, plan = read_plan(model), dict[str, str]()
    for node in (n for n in model.graph if n.op_type in WEIGHTED):
        layer, format = layer_of(node), found[str(node.name)]
        if layer is not None and plan.setdefault(layer, format) != format:
            raise ValueError(
                f"Expected layer {layer!r} to have one format, but its calls have {plan[layer]} "
                f"and {format}."
            )
    return plan


def layer_of(node: ir.Node) -> str | None:
    """Return the layer that a product belongs to, ``None`` for one of two activations.

    A float attention multiplies by the weight of its output projection itself.
    """
    weight = stored(node.inputs[1])
    if weight is None:
        return None
    layer = str(node.name).partition("@")[0]
    owner = str(weight.name).rpartition(".weight")[0]
    return owner if owner.startswith(f"{layer}.") else layer


def stored(value: ir.Value | None) -> ir.Value | None:
    """Return the constant that a weight comes from, ``None`` where it is computed."""
    while (move := producer(value, *_ON_THE_WAY)) is not None:
        value = move.inputs[0]
    return value if constant(value) is not None else None


def _weight_format(value: ir.Value | None) -> str:
    """Return the format that a weight is stored in, also where it is then cast to 16 bits."""
    source = value
    while (move := producer(source, "Transpose", "Reshape", "Cast")) is not None:
        source = move.inputs[0]
    return _format(source if producer(source, "DequantizeLinear") is not None else value)


def _format(value: ir.Value | None) -> str:
    assert value is not None
    source = value.producer()
    if source is not None and source.op_type == "DequantizeLinear":
        dtype = code_type(source)
        return _CODES.get(dtype, dtype.name.lower()) if dtype is not None else "unknown"
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
