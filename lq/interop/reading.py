"""Read formats and ranges out of a Q/DQ graph, whoever wrote it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from lq.export.graph import WEIGHTED, constant, input_at, producer, quantization_axis
from lq.export.grid import code_type, passed_on
from lq.export.linter.finding import name_of
from lq.export.linter.layers import stored_weight
from lq.export.linter.linting import read
from lq.export.linter.target_rules import INTEGER_OPERATORS
from lq.export.plan import layer_of, node_format, stored

_NNCF = "q_output_"
"""What NNCF puts before the name of a weight that it stores as codes."""
_NAMES = {"float8e4m3fn": "fp8_e4m3", "float8e5m2": "fp8_e5m2"}


@dataclass(frozen=True)
class TensorRange:
    """How a graph quantizes one tensor: ``value = (code - zero_point) * scale``.

    Attributes:
        format: Type of the codes: ``int8``, ``uint8``, ``int16``, ``int4``, ``fp8_e4m3``, ...
        scale: ``[]`` per tensor, ``[C]`` per channel, ``[.., blocks, ..]`` per block.
        zero_point: Code of 0, of the same shape.
        axis: Channel axis, ``None`` per tensor.
        stored: What a constant is stored as: ``"codes"`` or ``"floats"``; ``None`` for a tensor
            that is computed.
        block: How many elements along `axis` share a scale, 0 unless quantized by blocks.
    """

    format: str
    scale: np.ndarray
    zero_point: np.ndarray
    axis: int | None = None
    stored: str | None = None
    block: int = 0

    @property
    def low(self) -> np.ndarray:
        """The smallest value that has a code."""
        return self._value(_limits(self.format)[0])

    @property
    def high(self) -> np.ndarray:
        """The largest value that has a code."""
        return self._value(_limits(self.format)[1])

    @property
    def amax(self) -> np.ndarray:
        """The magnitude that maps to the largest code; with a zero-point, of the larger end."""
        return np.where(self.zero_point == 0, self.high, np.maximum(-self.low, self.high))

    @property
    def is_symmetric(self) -> bool:
        """Whether the codes are signed and 0 has the code 0."""
        return not self.format.startswith("uint") and not bool(np.any(self.zero_point))

    def same_as(self, other: TensorRange) -> bool:
        """Return whether another quantizes in the same way."""
        mine, theirs = ((r.format, r.axis, r.block, r.stored) for r in (self, other))
        pairs = (self.scale, other.scale), (self.zero_point, other.zero_point)
        return mine == theirs and all(np.array_equal(a, b) for a, b in pairs)

    def _value(self, code: float) -> np.ndarray:
        value: np.ndarray = (np.float32(code) - self.zero_point.astype(np.float32)) * self.scale
        return value


@dataclass(frozen=True)
class GraphLayer:
    """One layer that multiplies, as a graph has it.

    Attributes:
        op: Its operator: ``Conv``, ``ConvTranspose``, ``Gemm`` or ``MatMul``.
        format: What it multiplies: one format, or two as ``weights/inputs``.
        module: The layer it is a call of: the module's name where the weight tells, that of the
            node otherwise; ``None`` for a product of two activations.
        input: The quantized tensor that it reads, a key of the ranges; ``None`` for a float one.
        weight: The same of its weight.
        parameters: Elements of the weight; 0 for a product of two activations.
        bytes: What they take in the file.
    """

    op: str
    format: str
    module: str | None
    input: str | None
    weight: str | None
    parameters: int
    bytes: int


@dataclass(frozen=True)
class QuantizedGraph:
    """What a Q/DQ graph says of formats and ranges.

    Attributes:
        layers: Layers by the names of their nodes.
        ranges: Quantized tensors by name.
        integer_operators: Nodes that compute with integers without Q/DQ, operator by name; their
            formats are not read.
    """

    layers: Mapping[str, GraphLayer]
    ranges: Mapping[str, TensorRange]
    integer_operators: Mapping[str, str]

    @property
    def plan(self) -> dict[str, str]:
        """Module -> format, of all that multiply by a weight; by node where its calls differ."""
        plan: dict[str, str] = {}
        for name, layer in self.layers.items():
            if layer.module is None:
                continue
            if plan.setdefault(layer.module, layer.format) != layer.format:
                plan[name] = layer.format
        return plan

    def __str__(self) -> str:
        counts = Counter(layer.format for layer in self.layers.values()).most_common()
        formats = ", ".join(f"{n} {name}" for name, n in counts)
        return f"{len(self.layers)} layers ({formats}), {len(self.ranges)} quantized tensors"


def read_onnx(model: str | Path | Any) -> QuantizedGraph:
    """Return the formats and ranges that a Q/DQ graph holds, ours or another tool's.

    Files of onnxruntime.quantization, nvidia-modelopt, pytorch-quantization and NNCF are read, with
    codes of 4, 8 or 16 bits, float8, zero-points, and scales per tensor, channel or block; weights
    may be stored as codes, or as floats with QuantizeLinear behind them.

    Args:
        model: Path of an ONNX file, or a model of ``onnx`` or ``onnx_ir``, which is not changed.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an ONNX model.

    Example:
        >>> from onnx import parser
        >>> graph = read_onnx(parser.parse_model('''
        ...   <ir_version: 8, opset_import: ["" : 18]>
        ...   example (float[n, 16] x) => (float[n, 16] y)
        ...   <float scale = {0.5}, uint8 zero = {3}>
        ...   {
        ...     codes = QuantizeLinear (x, scale, zero)
        ...     y = DequantizeLinear (codes, scale, zero)
        ...   }'''))
        >>> found = graph.ranges["x"]
        >>> found.format, found.low.item(), found.high.item()
        ('uint8', -1.5, 126.0)
    """
    graph, found = read(model).graph, _Ranges()
    for node in graph:
        if _dequantizes(node):
            found.add(node)
    layers = {name_of(n): _layer(n, found) for n in graph if n.op_type in WEIGHTED}
    operators = {name_of(n): n.op_type for n in graph if n.op_type in INTEGER_OPERATORS}
    return QuantizedGraph(layers, found.by_name, operators)


class _Ranges:
    def __init__(self) -> None:
        self.by_name: dict[str, TensorRange] = {}

    def add(self, dequantize: ir.Node) -> str | None:
        """Note the range of what a DequantizeLinear returns, and return the tensor's name."""
        scale, dtype = constant(dequantize.inputs[1]), code_type(dequantize)
        if scale is None or dtype is None:
            return None
        constant_of, codes = stored_weight(dequantize), dequantize.inputs[0]
        quantize = producer(codes, "QuantizeLinear")
        tensor = codes if quantize is None else quantize.inputs[0]
        assert tensor is not None
        kind = None if constant_of is None else "codes" if quantize is None else "floats"
        found, name = _range(dequantize, scale, dtype, kind), str(tensor.name)
        if not self.by_name.get(name, found).same_as(found):  # as one more layer reads it
            name = f"{name}/{(quantize or dequantize).name}"
        self.by_name.setdefault(name, found)
        return name


def _range(node: ir.Node, scale: np.ndarray, dtype: ir.DataType, stored: str | None) -> TensorRange:
    block = node.attributes.get_int("block_size", 0)
    axis = node.attributes.get_int("axis", 1) if block else quantization_axis(node)
    shape = () if axis is None else scale.shape
    zero_point = constant(input_at(node, 2))
    zeros = np.zeros(shape, np.int32)
    if zero_point is not None and dtype.is_integer():
        zeros = np.broadcast_to(zero_point.astype(np.int32).reshape(shape), shape)
    return TensorRange(
        _format(dtype), scale.astype(np.float32).reshape(shape), zeros, axis, stored, block
    )


def _format(dtype: ir.DataType) -> str:
    name = dtype.name.lower()
    return _NAMES.get(name, name)


def _limits(format: str) -> tuple[float, float]:
    dtype: Any = next(d for d in ir.DataType if _format(d) == format).numpy()
    info: Any = ml_dtypes.finfo if format.startswith("f") else ml_dtypes.iinfo
    info = info(dtype)
    return float(info.min), float(info.max)


def _layer(node: ir.Node, ranges: _Ranges) -> GraphLayer:
    input, weight = (_dequantize_of(node.inputs[i]) for i in (0, 1))
    constant_of = stored(node.inputs[1])
    held = None if constant_of is None else constant_of.const_value
    return GraphLayer(
        node.op_type,
        node_format(node),
        None if constant_of is None else _module(node, str(constant_of.name)),
        None if input is None else ranges.add(input),
        None if weight is None else ranges.add(weight),
        0 if held is None else int(held.size),
        0 if held is None else int(held.nbytes),
    )


def _module(node: ir.Node, weight: str) -> str | None:
    """Return the module that a layer is, where the name of its weight tells."""
    module, found, _ = weight.removeprefix(_NNCF).rpartition(".weight")
    return module if found else layer_of(node) or name_of(node)


def _dequantize_of(value: ir.Value | None) -> ir.Node | None:
    """Return the DequantizeLinear that a value comes from, by way of what makes no new numbers."""
    node = value.producer() if value is not None else None
    if node is None or _dequantizes(node):
        return node
    if node.op_type == "Cast":
        return _dequantize_of(node.inputs[0])
    found = {_dequantize_of(source) for source in passed_on(node)}
    return found.pop() if len(found) == 1 else None


def _dequantizes(node: ir.Node) -> bool:
    return node.op_type == "DequantizeLinear"
