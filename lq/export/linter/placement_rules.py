"""Rules on where Q/DQ pairs stand."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from lq.export.graph import WEIGHTED, producer, users
from lq.export.grid import Grid, grid_of, pair_grid
from lq.export.linter.layers import is_computed, is_quantized, layers, layers_after, layers_before

Found = Iterator[tuple[ir.Node, str]]
ACTIVATIONS = (
    "Relu",
    "Clip",
    "LeakyRelu",
    "PRelu",
    "Elu",
    "Sigmoid",
    "HardSigmoid",
    "HardSwish",
    "Gelu",
    "Mish",
    "Tanh",
)
_QUANTIZED_INPUTS = {"tensorrt": 1}
"""Inputs of a residual Add that a target wants quantized, if not both: TensorRT fuses the other
branch's convolution, the sum and the next QuantizeLinear into one kernel."""

PAIRS_BEHIND = {"onnxruntime": ("MaxPool",)}
"""Operators behind which a target wants a pair, though it changes nothing: ONNX Runtime pools
integers only between Q/DQ."""


def _quantizers(graph: ir.Graph) -> Iterator[tuple[ir.Node, Grid]]:
    for node in graph:
        grid = pair_grid(node) if node.op_type == "QuantizeLinear" else None
        if grid is not None and is_computed(node.inputs[0]):
            yield node, grid


def residual(graph: ir.Graph, target: str) -> Found:
    """Yield sums of quantized layers whose inputs are not quantized."""
    for add in graph:
        if add.op_type != "Add" or not all(is_computed(value) for value in add.inputs):
            continue
        before = [layers_before(value) for value in add.inputs]
        near = [layer for side in before for layer in side]
        if not all(before) or not any(is_quantized(layer) for layer in near):
            continue
        quantized = sum(grid_of(value) is not None for value in add.inputs)
        wanted = _QUANTIZED_INPUTS.get(target, 2)
        if quantized < wanted:
            yield add, f"{quantized} of its inputs are quantized where {target} wants {wanted}"


def concat(graph: ir.Graph, target: str) -> Found:
    """Yield concatenations that are quantized in part, or behind instead of before."""
    for node in graph:
        if node.op_type != "Concat":
            continue
        quantized = [grid_of(value) is not None for value in node.inputs]
        behind = any(user.op_type == "QuantizeLinear" for user in users(node.outputs[0]))
        if (behind or any(quantized)) and not all(quantized):
            yield node, f"{sum(quantized)} of its {len(quantized)} inputs are quantized"


def concat_scale(graph: ir.Graph, target: str) -> Found:
    """Yield concatenations whose inputs have different scales."""
    for node in graph:
        if node.op_type == "Concat":
            grids = [grid_of(value) for value in node.inputs]
            scales = sorted({grid.scale for grid in grids if grid is not None})
            if None not in grids and len(set(grids)) > 1:
                shown = ", ".join(f"{scale:.4g}" for scale in scales)
                yield node, f"its inputs have different scales or zero-points ({shown})"


def extra_pair(graph: ir.Graph, target: str) -> Found:
    """Yield quantizers that change nothing, or that another one doubles."""
    seen: set[tuple[ir.Value | None, Grid]] = set()
    for node, grid in _quantizers(graph):
        if producer(node.inputs[0], *PAIRS_BEHIND.get(target, ())) is not None:
            continue
        if grid_of(node.inputs[0]) == grid:
            yield node, "its input is quantized already, with the same scale"
        elif (node.inputs[0], grid) in seen:
            yield node, "another pair quantizes the same tensor with the same scale"
        seen.add((node.inputs[0], grid))


def requantized(graph: ir.Graph, target: str) -> Found:
    """Yield quantizers of what another scale has just rounded."""
    for node, grid in _quantizers(graph):
        source = producer(node.inputs[0], "DequantizeLinear")
        before = pair_grid(source) if source is not None else None
        if before is not None and before != grid:
            yield node, f"its input was rounded to scale {before.scale:.4g}, it is {grid.scale:.4g}"


def two_scales(graph: ir.Graph, target: str) -> Found:
    """Yield quantizers that give a tensor a second scale."""
    first: dict[ir.Value | None, Grid] = {}
    for node, grid in _quantizers(graph):
        other = first.setdefault(node.inputs[0], grid)
        if other != grid:
            yield node, f"its input is quantized with scale {other.scale:.4g} too"


def before_activation(graph: ir.Graph, target: str) -> Found:
    """Yield pairs between a layer and the BatchNorm or activation it is fused with."""
    for node in graph:
        if node.op_type not in (*ACTIVATIONS, "BatchNormalization"):
            continue
        quantize = _quantize_behind(node.inputs[0])
        layer = producer(quantize.inputs[0], *WEIGHTED, "BatchNormalization") if quantize else None
        if quantize is not None and layer is not None:
            yield quantize, f"it stands between {layer.op_type} and {node.op_type}"


def after_pad(graph: ir.Graph, target: str) -> Found:
    """Yield pairs between a Pad and the convolution that could take it in."""
    for layer in layers(graph):
        quantize = _quantize_behind(layer.inputs[0])
        if quantize is not None and producer(quantize.inputs[0], "Pad") is not None:
            yield quantize, f"it stands between Pad and {layer.op_type}"


def _quantize_behind(value: ir.Value | None) -> ir.Node | None:
    dequantize = producer(value, "DequantizeLinear")
    return producer(dequantize.inputs[0], "QuantizeLinear") if dequantize is not None else None


def float_island(graph: ir.Graph, target: str) -> Found:
    """Yield quantized layers among float ones only."""
    for layer in layers(graph):
        near = [*layers_before(layer.inputs[0]), *layers_after(layer.outputs[0])]
        if near and is_quantized(layer) and not any(is_quantized(other) for other in near):
            yield layer, "it is quantized and all layers next to it are float"
