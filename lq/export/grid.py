"""Which numbers a tensor can hold: those of a Q/DQ pair, through what only passes them on."""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lq.export.graph import constant, input_at, users

MOVES = (
    "Identity",
    "Dropout",
    "Reshape",
    "Flatten",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Expand",
    "Tile",
    "Slice",
    "Split",
    "Gather",
    "DepthToSpace",
    "SpaceToDepth",
)
"""Operators whose outputs are elements of their first input."""


@dataclass(frozen=True)
class Grid:
    """The numbers ``(code - zero_point) * scale`` of a per-tensor quantizer."""

    scale: float
    zero_point: int
    dtype: ir.DataType

    @property
    def codes(self) -> tuple[float, float]:
        """The smallest and the largest code."""
        info = ml_dtypes.iinfo if self.dtype.is_integer() else ml_dtypes.finfo
        limits = info(self.dtype.numpy())
        return float(limits.min), float(limits.max)

    def clips_to(self, bound: float) -> bool:
        """Return whether numbers of the grid, clipped to a bound, stay on the grid."""
        scale = np.float32(self.scale)
        code = np.rint(np.float32(bound) / scale)
        low, high = (limit - self.zero_point for limit in self.codes)
        return not low < code < high or bool(self.dtype.is_integer() and code * scale == bound)


def pair_grid(node: ir.Node) -> Grid | None:
    """Return the grid of a per-tensor QuantizeLinear or DequantizeLinear, if it is constant."""
    scale, zero_point = constant(node.inputs[1]), constant(input_at(node, 2))
    if scale is None or scale.size != 1 or node.domain not in ("", "com.microsoft"):
        return None
    dtype = code_type(node)
    if dtype is None:
        return None
    zero = 0 if zero_point is None else int(zero_point.astype(np.float32).item())
    return Grid(float(scale.item()), zero, dtype)


def input_grids(model: ir.Model) -> dict[str, Grid | None]:
    """Return the grid to which each input of a graph is first quantized, ``None`` if it is not.

    Moves of elements, such as a transposition, may come before.
    """
    return {str(value.name): _first_grid(value) for value in model.graph.inputs}


def _first_grid(value: ir.Value) -> Grid | None:
    for node in users(value):
        if node.inputs[0] is value:
            moved = _first_grid(node.outputs[0]) if node.op_type in MOVES else None
            grid = pair_grid(node) if node.op_type == "QuantizeLinear" else moved
            if grid is not None:
                return grid
    return None


def code_type(node: ir.Node) -> ir.DataType | None:
    """Return the type of the codes of a QuantizeLinear or DequantizeLinear."""
    zero_point = input_at(node, 2)
    if zero_point is not None:
        return _dtype(zero_point)
    if node.op_type == "QuantizeLinear":
        return ir.DataType(node.attributes.get_int("output_dtype", 0) or ir.DataType.UINT8)
    codes = node.inputs[0]
    assert codes is not None
    source = codes.producer()
    quantizes = source is not None and source.op_type == "QuantizeLinear"
    return code_type(source) if quantizes else _dtype(codes)  # type: ignore[arg-type]


def _dtype(value: ir.Value) -> ir.DataType | None:
    tensor = ir.convenience.get_const_tensor(value)
    return tensor.dtype if tensor is not None else value.dtype


def passed_on(node: ir.Node) -> list[ir.Value]:
    """Return the inputs whose elements, or zeros, are all that a node returns; none if it computes.

    Max pooling, Relu, Clip to bounds that are themselves on the grid, and moves of elements.
    """
    if node.op_type == "Concat":
        return [value for value in node.inputs if value is not None]
    moves = node.op_type in (*MOVES, "MaxPool", "Relu") or is_nearest(node) or pads_exactly(node)
    if moves or _clips_to_grid(node):
        return [node.inputs[0]] if node.inputs[0] is not None else []
    return []


def is_nearest(node: ir.Node) -> bool:
    """Return whether a node resizes by repeating elements."""
    return node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") == "nearest"


def pads_exactly(node: ir.Node) -> bool:
    """Return whether a node pads with zeros or with elements of its input."""
    if node.op_type != "Pad":
        return False
    value = constant(input_at(node, 2))
    constant_mode = node.attributes.get_string("mode", "constant") == "constant"
    computed = input_at(node, 2) is not None and value is None
    return not constant_mode or (not computed and (value is None or not value.any()))


def grid_of(value: ir.Value | None) -> Grid | None:
    """Return the grid whose numbers alone a value can hold, ``None`` if it is not known."""
    node = value.producer() if value is not None else None
    if node is None:
        return None
    if node.op_type == "DequantizeLinear":
        return pair_grid(node)
    grids = {grid_of(source) for source in passed_on(node)}
    return grids.pop() if len(grids) == 1 else None


def _clips_to_grid(node: ir.Node) -> bool:
    grid = grid_of(node.inputs[0]) if node.op_type == "Clip" else None
    bounds = [constant(bound) for bound in node.inputs[1:] if bound is not None]
    return grid is not None and all(
        bound is not None and grid.clips_to(float(bound.item())) for bound in bounds
    )
