"""Q/DQ pairs moved to where an engine fuses them; every move is exact.

Rounding to a grid is monotone and keeps zero, so it commutes with whatever only picks elements:
``Q(maxpool(x)) = maxpool(Q(x))``, ``Q(concat(x, y)) = concat(Q(x), Q(y))``.
"""

from __future__ import annotations

import onnx_ir as ir

from lq.export.graph import insert_after, only_feeds, producer, users
from lq.export.grid import Grid, code_type, grid_of, is_nearest, pads_exactly, pair_grid
from lq.export.passes.naming import PART, QUANTIZED_BY, quantizer_call

_MOVED_OVER = (
    "MaxPool",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Concat",
    "DepthToSpace",
    "SpaceToDepth",
)


def remove_requantization(graph: ir.Graph, wanted_behind: tuple[str, ...] = ()) -> list[ir.Node]:
    """Remove Q/DQ pairs from tensors that hold nothing but the numbers of their grid.

    A quantized tensor passes through MaxPool, Reshape, Transpose, Concat, Clip and their like
    without a second pair. Returns the QuantizeLinear nodes it left without use.

    Args:
        graph: The graph.
        wanted_behind: Operators behind which pairs stay.
    """
    removed = []
    for quantize in list(graph):
        grid = pair_grid(quantize) if quantize.op_type == "QuantizeLinear" else None
        if grid is None or grid_of(quantize.inputs[0]) != grid:
            continue
        if producer(quantize.inputs[0], *wanted_behind) is not None:
            continue
        value, pairs = quantize.inputs[0], _dequantizers(quantize, grid)
        assert value is not None
        for dequantize in pairs:
            dequantize.outputs[0].replace_all_uses_with(value)
        removed += [quantize] if pairs else []
    return removed


def _dequantizers(quantize: ir.Node, grid: Grid) -> list[ir.Node]:
    """Return the nodes that give back what a QuantizeLinear was given, rounded to its grid."""
    return [
        node
        for node in users(quantize.outputs[0])
        if node.op_type == "DequantizeLinear"
        and pair_grid(node) == grid
        and not node.outputs[0].is_graph_output()
    ]


def move_quantize_up(graph: ir.Graph) -> list[ir.Node]:
    """Move Q/DQ pairs from behind pooling, concatenation, padding and reshapes to before them.

    There they stand behind the activation that an engine fuses them with, and all inputs of a
    concatenation have one scale. Returns the nodes that pairs were moved over.
    """
    moved: list[ir.Node] = []
    queue = [node for node in graph if node.op_type == "QuantizeLinear"]
    while queue:
        quantize = queue.pop()
        over = quantize.inputs[0].producer() if quantize.inputs[0] is not None else None
        if over is not None and _may_move(quantize, over):
            queue += _move_up(graph, quantize, over)
            moved.append(over)
    graph.sort()  # a pair that is shared may have stood behind its new reader
    return moved


def _may_move(quantize: ir.Node, over: ir.Node) -> bool:
    grid, readers = pair_grid(quantize), users(quantize.outputs[0])
    return (
        (over.op_type in _MOVED_OVER or is_nearest(over) or pads_exactly(over))
        and grid is not None
        and len(over.outputs) == 1
        and only_feeds(over.outputs[0], quantize)
        and all(value.producer() is not None for value in _elements(over))
        and bool(readers)
        and readers == _dequantizers(quantize, grid)
    )


def _elements(node: ir.Node) -> list[ir.Value]:
    values = node.inputs if node.op_type == "Concat" else node.inputs[:1]
    return [value for value in values if value is not None]


def _move_up(graph: ir.Graph, quantize: ir.Node, over: ir.Node) -> list[ir.Node]:
    """Put a pair on each input of a node instead of on its output, and return the new Qs."""
    dequantizers = users(quantize.outputs[0])
    values, new = _elements(over), []
    for index, value in enumerate(values):
        dequantized = _dequantized(value, quantize)
        if dequantized is None:
            first, second = _copy_pair(quantize, dequantizers[0], value)
            _name_part(first, second, f"/in{index}" if len(values) > 1 else "")
            graph.insert_before(over, [first, second])
            new.append(first)
            dequantized = second.outputs[0]
        over.replace_input_with(index, dequantized)
    for dequantize in dequantizers:
        dequantize.outputs[0].replace_all_uses_with(over.outputs[0])
        graph.remove(dequantize, safe=True)
    graph.remove(quantize, safe=True)
    if PART not in quantize.metadata_props:  # the place that it stood at first
        over.metadata_props[QUANTIZED_BY] = quantizer_call(quantize)
    return new


def _name_part(quantize: ir.Node, dequantize: ir.Node, part: str) -> None:
    for node in (quantize, dequantize):
        node.name = f"{node.name}{part}" if node.name else None  # the graph names what has none
    quantize.metadata_props[PART] = quantize.metadata_props.get(PART, "") + part


def _dequantized(value: ir.Value, like: ir.Node) -> ir.Value | None:
    """Return what a pair that already stands behind a value gives, if its grid is that wanted."""
    grid = pair_grid(like)
    for quantize in [node for node in users(value) if node.op_type == "QuantizeLinear"]:
        if grid is not None and pair_grid(quantize) == grid:
            for dequantize in _dequantizers(quantize, grid):
                return dequantize.outputs[0]
    return None


def _copy_pair(quantize: ir.Node, dequantize: ir.Node, value: ir.Value) -> tuple[ir.Node, ir.Node]:
    first = _copy(quantize, value)
    second = _copy(dequantize, first.outputs[0])
    dtype = code_type(quantize)
    first.outputs[0].type = ir.TensorType(dtype) if dtype is not None else None
    second.outputs[0].type = value.type
    for output in (first.outputs[0], second.outputs[0]):
        output.shape = value.shape
    return first, second


def _copy(node: ir.Node, value: ir.Value) -> ir.Node:
    new = ir.node(
        node.op_type,
        [value, *node.inputs[1:]],
        dict(node.attributes),
        domain=node.domain,
        version=node.version,
        name=node.name or None,
    )
    new.metadata_props.update(node.metadata_props)
    return new


def move_activations_before_quantize(graph: ir.Graph) -> list[ir.Node]:
    """Move a Relu from behind a Q/DQ pair to before it, next to the layer it is fused with.

    ``relu(Q(x)) = Q(relu(x))`` with zero-point 0. Returns the nodes that were moved.
    """
    moved = []
    for relu in [node for node in graph if node.op_type == "Relu"]:
        dequantize = producer(relu.inputs[0], "DequantizeLinear")
        quantize = producer(dequantize.inputs[0], "QuantizeLinear") if dequantize else None
        if quantize is None or dequantize is None or not _relu_may_move(relu, quantize, dequantize):
            continue
        relu.replace_input_with(0, quantize.inputs[0])
        pair = _copy_pair(quantize, dequantize, relu.outputs[0])
        insert_after(graph, relu.outputs[0], list(pair))
        moved.append(relu)
    return moved


def _relu_may_move(relu: ir.Node, quantize: ir.Node, dequantize: ir.Node) -> bool:
    grid = pair_grid(quantize)
    return (
        grid is not None
        and grid.zero_point == 0
        and grid == pair_grid(dequantize)
        and only_feeds(quantize.outputs[0], dequantize)
        and only_feeds(dequantize.outputs[0], relu)
        and not relu.outputs[0].is_graph_output()
    )
