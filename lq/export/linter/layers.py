"""Layers of a graph and their neighbours, as rules ask for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from lq.export.graph import WEIGHTED, constant, producer, users
from lq.export.grid import grid_of
from lq.gemm import product_size


def layers(graph: ir.Graph) -> list[ir.Node]:
    """Return the nodes that multiply by a weight, or two activations."""
    return [node for node in graph if node.op_type in WEIGHTED]


def weight_dequantize(layer: ir.Node) -> ir.Node | None:
    """Return the DequantizeLinear of a layer's stored weight."""
    value = layer.inputs[1]
    while (move := producer(value, "Transpose", "Reshape")) is not None:
        value = move.inputs[0]
    node = producer(value, "DequantizeLinear")
    return node if node is not None and stored_weight(node) is not None else None


def stored_weight(dequantize: ir.Node) -> ir.Value | None:
    """Return the constant behind a DequantizeLinear, codes or floats, if there is one."""
    value = dequantize.inputs[0]
    quantize = producer(value, "QuantizeLinear")
    value = value if quantize is None else quantize.inputs[0]
    return value if constant(value) is not None else None


def is_quantized(layer: ir.Node) -> bool:
    """Return whether a layer multiplies codes by codes."""
    second = weight_dequantize(layer) is not None or grid_of(layer.inputs[1]) is not None
    return second and grid_of(layer.inputs[0]) is not None


def is_computed(value: ir.Value | None) -> bool:
    """Return whether a value depends on the graph's inputs."""
    if value is None or constant(value) is not None:
        return False
    dequantize = producer(value, "DequantizeLinear")
    return dequantize is None or stored_weight(dequantize) is None


def layers_before(value: ir.Value | None) -> list[ir.Node]:
    """Return the nearest layers that a value is computed from."""

    def back(node: ir.Node) -> list[ir.Node | None]:
        return [v.producer() for v in node.inputs if v is not None]

    return _nearest([value.producer() if value is not None else None], back)


def layers_after(value: ir.Value) -> list[ir.Node]:
    """Return the nearest layers that are computed from a value."""
    return _nearest(users(value), lambda node: [u for v in node.outputs for u in users(v)])


def _nearest(
    start: Iterable[ir.Node | None], step: Callable[[ir.Node], Iterable[ir.Node | None]]
) -> list[ir.Node]:
    found, seen, queue = [], set(), list(start)
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in WEIGHTED:
            found.append(node)
        else:
            queue += step(node)
    return found


def product(layer: ir.Node) -> tuple[int, int] | None:
    """Return ``(K, N)`` of a layer's product in each group, ``None`` where the shape varies."""
    dequantize = weight_dequantize(layer)
    weight = stored_weight(dequantize) if dequantize is not None else None
    if weight is None or weight.shape is None or not weight.shape.is_static():
        return None
    shape = weight.shape.numpy()
    if layer.op_type in ("Conv", "ConvTranspose"):
        groups = layer.attributes.get_int("group", 1)
        return product_size(shape, groups, layer.op_type == "ConvTranspose")
    transposed = layer.attributes.get_int("transB", 0) or producer(layer.inputs[1], "Transpose")
    return (shape[-1], shape[-2]) if transposed else (shape[-2], shape[-1])
