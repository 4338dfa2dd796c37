"""Passes over an exported graph, each one idea; they change the graph in place."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply by a weight."""
SCOPES = "pkg.torch.onnx.name_scopes"
_CALL = "lq.call"
OUTPUT_OF = "lq.output_of"
"""Metadata of a node: the module whose output is the node's."""


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return what an initializer or constant holds, ``None`` for a computed value."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else np.asarray(tensor.numpy())


def scope(node: ir.Node) -> str:
    """Return the qualified name of the torch module a node comes from."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['']"))
    return str(scopes[-2]) if len(scopes) > 1 else ""


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """Return the node that computes a value, if it is of that type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def _add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}.{count}", count + 1
    tensor = ir.tensor(np.ascontiguousarray(array), name=unique)
    value = ir.Value(
        name=unique,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def number_calls(graph: ir.Graph) -> None:
    """Number the calls of every quantizer, before equal ones are merged and unused removed."""
    calls: Counter[str] = Counter()
    for node in graph:
        if node.op_type == "QuantizeLinear":
            node.metadata_props[_CALL] = str(calls[scope(node)])
            calls[scope(node)] += 1


def mark_outputs(graph: ir.Graph) -> None:
    """Mark the nodes whose output is that of a module with a weight: the last of its nodes."""
    last = {scope(node): node for node in graph if len(node.outputs) == 1}
    weighted = {scope(node) for node in graph if node.op_type in WEIGHTED}
    for name in weighted:
        if not any(inner.startswith(f"{name}.") for inner in weighted):  # as an attention has
            last[name].metadata_props.setdefault(OUTPUT_OF, name)


def fold_weight_casts(graph: ir.Graph) -> None:
    """Store the weights of 16-bit layers in 16 bits, instead of casting them at every run."""
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Cast" else None
        if weight is None or not weight.is_initializer() or weight.const_value is None:
            continue
        dtype = ir.DataType(node.attributes["to"].as_int())
        array = weight.const_value.numpy().astype(dtype.numpy())
        folded = _add_initializer(graph, f"{weight.name}.{dtype.name.lower()}", array)
        node.outputs[0].replace_all_uses_with(folded)
        graph.remove(node, safe=True)


def store_integer_weights(graph: ir.Graph) -> None:
    """Replace each float weight behind QuantizeLinear by its integers.

    ``integers = clamp(round_half_even(weight / scale), -127, 127)``, the same codes that
    fake-quant computes: both divide in float32.
    """
    for node in list(graph):
        if node.op_type != "QuantizeLinear" or not _is_weight(node.inputs[0]):
            continue
        weight, scale = node.inputs[0], constant(node.inputs[1])
        assert weight is not None
        assert weight.const_value is not None
        assert scale is not None
        array = weight.const_value.numpy()
        axis = node.attributes.get_int("axis", 1) if scale.ndim else None
        codes = np.rint(array / _along(scale, axis, array.ndim)).clip(-127, 127)
        name = f"{weight.name}.int8"
        node.outputs[0].replace_all_uses_with(_add_initializer(graph, name, codes.astype(np.int8)))
        graph.remove(node, safe=True)


def _is_weight(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer()


def _along(scale: np.ndarray, axis: int | None, ndim: int) -> np.ndarray:
    if axis is None:
        return scale
    return scale.reshape([-1 if i == axis else 1 for i in range(ndim)])


def fold_batchnorm(graph: ir.Graph) -> None:
    """Fold BatchNorm into the quantized layer before it, without touching its integers.

    With ``factor = gamma / sqrt(variance + eps)`` per output channel:

    ``scale' = scale * |factor|``, ``integers' = integers * sign(factor)``,
    ``bias' = beta + (bias - mean) * factor``

    A factor of zero gives integers of zero and keeps the scale, which must be positive.
    """
    for norm in [n for n in graph if n.op_type == "BatchNormalization"]:
        layer = norm.inputs[0].producer() if norm.inputs[0] is not None else None
        if layer is None or layer.op_type not in WEIGHTED or not _only_feeds(layer, norm):
            continue
        dequantize = producer(layer.inputs[1], "DequantizeLinear")
        if dequantize is None or not _has_channel_axis(layer, dequantize):
            continue
        _fold(graph, layer, dequantize, norm)


def _only_feeds(layer: ir.Node, node: ir.Node) -> bool:
    output = layer.outputs[0]
    return [user for user, _ in output.uses()] == [node] and not output.is_graph_output()


def _has_channel_axis(layer: ir.Node, dequantize: ir.Node) -> bool:
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
    codes, scale = constant(dequantize.inputs[0]), constant(dequantize.inputs[1])
    assert codes is not None
    assert scale is not None
    factor = gamma / np.sqrt(variance + norm.attributes.get_float("epsilon", 1e-5))
    scale = np.broadcast_to(scale, factor.shape)
    folded = (scale * np.abs(factor)).astype(np.float32)
    zero = folded < np.finfo(np.float32).tiny
    sign = np.where(zero, 0, np.sign(factor)).astype(np.int8)
    axis = 1 if layer.op_type == "ConvTranspose" else 0
    bias = constant(layer.inputs[2]) if len(layer.inputs) > 2 else None
    bias = beta + ((0.0 if bias is None else bias) - mean) * factor

    name = scope(layer)
    inputs = [
        _add_initializer(graph, f"{name}.weight.int8", codes * _along(sign, axis, codes.ndim)),
        _add_initializer(graph, f"{name}.weight.scale", np.where(zero, scale, folded)),
        _add_initializer(graph, f"{name}.weight.zero_point", np.zeros(factor.shape, np.int8)),
    ]
    new = ir.node("DequantizeLinear", inputs, {"axis": axis}, version=dequantize.version)
    new.metadata_props.update(dequantize.metadata_props)
    graph.insert_before(layer, new)
    layer.replace_input_with(1, new.outputs[0])
    bias_value = _add_initializer(graph, f"{name}.bias.folded", bias.astype(np.float32))
    if len(layer.inputs) > 2:
        layer.replace_input_with(2, bias_value)
    else:
        layer.resize_inputs(3)
        layer.replace_input_with(2, bias_value)
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


def remove_unused(graph: ir.Graph) -> None:
    """Remove nodes and initializers that nothing uses."""
    for node in reversed(list(graph)):
        if not any(o.uses() or o.is_graph_output() for o in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]


def name_after_modules(graph: ir.Graph) -> None:
    """Name nodes and values after the torch modules they come from.

    A layer's own operator has the layer's qualified name, so that an engine's profile can be
    mapped back; QuantizeLinear and DequantizeLinear have their quantizer's.
    """
    if len(graph.outputs) == 1 and graph.outputs[0].producer() is not None:
        graph.outputs[0].name = "output"
    for name, value in list(graph.initializers.items()):
        base = name.removesuffix(".1")
        if base not in graph.initializers:
            value.name = base
    outputs = set(graph.outputs)
    taken: Counter[str] = Counter()
    for node, wanted in _wanted_names(graph):
        count = int(node.metadata_props.get(_CALL, taken[wanted]))
        taken[wanted] += 1
        node.name = wanted if count == 0 else f"{wanted}@{count}"
        for i, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = f"{node.name}/out{i or ''}"


def _wanted_names(graph: ir.Graph) -> Iterator[tuple[ir.Node, str]]:
    per_scope = Counter(scope(node) for node in graph)
    for node in graph:
        name = scope(node)
        quantizes = node.op_type == "QuantizeLinear"
        if not name or not (node.op_type in WEIGHTED or quantizes or per_scope[name] == 1):
            name = f"{name}/{node.op_type}" if name else node.op_type
        yield node, name


def clear_metadata(graph: ir.Graph) -> None:
    """Drop what the exporter noted of each node, stack traces with paths of the machine too."""
    for node in graph:
        node.doc_string = None
        kept = {k: v for k, v in node.metadata_props.items() if k == OUTPUT_OF}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()
