"""Find what makes a Q/DQ graph slow or wrong on its target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from lq.export.graph import add_initializer, constant, input_at, load_graph, producer
from lq.export.linter.finding import Finding, name_of
from lq.export.linter.rules import RULES
from lq.export.linter.target_rules import CODES


def lint(model: str | Path | Any, target: str = "tensorrt") -> list[Finding]:
    """Return what makes a Q/DQ graph slow or wrong on a target, whoever wrote it.

    Args:
        model: Path of an ONNX file, or a model of ``onnx`` or ``onnx_ir``, which is not changed.
        target: What will run it: ``"tensorrt"``, ``"onnxruntime"`` or ``"openvino"``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an ONNX model, or the target is not known.

    Example:
        >>> from onnx import parser
        >>> model = parser.parse_model('''
        ...   <ir_version: 8, opset_import: ["" : 18]>
        ...   example (float[n, 16] x) => (float[n, 16] y)
        ...   <float scale = {0.1}, int8 zero = {3}>
        ...   {
        ...     codes = QuantizeLinear (x, scale, zero)
        ...     y = DequantizeLinear (codes, scale, zero)
        ...   }''')
        >>> [finding.rule for finding in lint(model)]
        ['zero-point']
        >>> lint(model, target="onnxruntime")
        []
    """
    if target not in CODES:
        raise ValueError(f"Expected `target` to be one of {', '.join(CODES)}, but got {target!r}.")
    graph = read(model).graph
    return [
        Finding(name, name_of(node), reason, rule.fix)
        for name, rule in RULES.items()
        for node, reason in rule.check(graph, target)
    ]


def read(model: str | Path | Any) -> ir.Model:
    """Return a copy of a model, or the one in a file, with all constants as initializers."""
    if isinstance(model, ir.Model):
        model = ir.to_proto(model)
    copy = _load(Path(model)) if isinstance(model, (str, Path)) else ir.from_proto(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(copy)
    _fold_zero_points(copy.graph)
    _use_onnx_float8(copy)
    return copy


def _fold_zero_points(graph: ir.Graph) -> None:
    """Make constants of zero-points that pytorch-quantization casts to the type of the codes."""
    for node in graph:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        cast = producer(input_at(node, 2), "Cast")
        zero_point = constant(cast.inputs[0]) if cast is not None else None
        if cast is not None and zero_point is not None:
            dtype = ir.DataType(cast.attributes["to"].as_int())
            codes = zero_point.astype(dtype.numpy())
            node.replace_input_with(2, add_initializer(graph, str(cast.outputs[0].name), codes))


def _load(path: Path) -> ir.Model:
    model = load_graph(path)
    if not len(model.graph):
        raise ValueError(f"Expected {str(path)!r} to be an ONNX model, but its graph is empty.")
    return model


def _use_onnx_float8(model: ir.Model) -> None:
    """Replace the float8 operators that TensorRT had first, which nvidia-modelopt writes."""
    zero_point = ir.tensor(np.zeros((), ml_dtypes.float8_e4m3fn))
    for node in model.graph:
        name = node.op_type.removeprefix("TRT_FP8")
        if node.domain != "trt" or name not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero = ir.Value(name=f"{node.outputs[0].name}.zero_point", const_value=zero_point)
        zero.type, zero.shape = ir.TensorType(zero_point.dtype), ir.Shape(())
        model.graph.register_initializer(zero)
        standard = ir.node(name, [*node.inputs[:2], zero], name=node.name)
        standard.outputs[0].name = node.outputs[0].name
        standard.outputs[0].type, standard.outputs[0].shape = (
            node.outputs[0].type,
            node.outputs[0].shape,
        )
        model.graph.insert_after(node, standard)
        node.outputs[0].replace_all_uses_with(standard.outputs[0])
        model.graph.remove(node)
        model.opset_imports[""] = max(model.opset_imports.get("", 1), 19)
