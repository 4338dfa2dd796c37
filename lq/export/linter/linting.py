"""Find what makes a Q/DQ graph slow or wrong on its target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from lq.export.graph import load_graph
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
    return copy


def _load(path: Path) -> ir.Model:
    model = load_graph(path)
    if not len(model.graph):
        raise ValueError(f"Expected {str(path)!r} to be an ONNX model, but its graph is empty.")
    return model
