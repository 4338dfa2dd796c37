"""Formats and ranges in an ONNX file, and what became of them in an engine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lq.export.engine import EngineInfo
from lq.export.graph import load_graph, weights_mb
from lq.export.inspector import fused
from lq.files import sha256
from lq.inspection.result import Inspection, size_of
from lq.interop.reading import QuantizedGraph, TensorRange, read_onnx


def inspect_graph(path: Path) -> Inspection:
    """Return what an ``.onnx`` file holds, whoever wrote it."""
    model, graph = load_graph(path), read_onnx(path)
    layers = graph.layers.values()
    facts: dict[str, Any] = {
        "size": size_of(path),
        "weights": f"{weights_mb(model):.3f} MB",
        "producer": f"{model.producer_name or '?'} {model.producer_version or ''}".strip(),
        "opset": ", ".join(f"{d or 'ai.onnx'} {v}" for d, v in model.opset_imports.items()),
        "inputs": _shapes(model.graph.inputs),
        "outputs": _shapes(model.graph.outputs),
        "layers": dict(Counter(layer.format for layer in layers).most_common()),
        "quantized tensors": len(graph.ranges),
    }
    if graph.integer_operators:
        kinds = Counter(graph.integer_operators.values())
        facts["integer operators, which have no Q/DQ"] = dict(kinds)
    return Inspection(str(path), "ONNX graph", facts, _layers(graph))


def _shapes(values: Any) -> str:
    return "; ".join(f"{v.name} {_shape(v)}" for v in values)


def _shape(value: ir.Value) -> str:
    return "?" if value.shape is None else f"[{', '.join(str(size) for size in value.shape)}]"


def _layers(graph: QuantizedGraph) -> list[dict[str, Any]]:
    return [
        {
            "node": name,
            "operator": layer.op,
            "format": layer.format,
            "input codes": layer.input and graph.ranges[layer.input].format,
            "input range": _ends(graph.ranges[layer.input]) if layer.input else None,
            "weight amax": _amax(graph.ranges[layer.weight]) if layer.weight else None,
            "parameters": layer.parameters,
            "kB": layer.bytes / 1e3,
        }
        for name, layer in graph.layers.items()
    ]


def _ends(range: TensorRange) -> list[float]:
    return [float(range.low.min()), float(range.high.max())]


def _amax(range: TensorRange) -> list[float] | float:
    amax = np.asarray(range.amax)
    return [float(amax.min()), float(amax.max())] if amax.size > 1 else float(amax.item())


def inspect_engine(path: Path) -> Inspection:
    """Return what the JSON sidecar of an engine says, and whether it is the engine's."""
    sidecar = EngineInfo.path_of(path)
    if not sidecar.is_file():
        raise FileNotFoundError(
            f"Expected the sidecar of the engine at {str(sidecar)!r}, but there is no file; build "
            "the engine with lq.build_engine, which writes it."
        )
    try:
        info = EngineInfo.load(path)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(
            f"Expected {str(sidecar)!r} to be the sidecar of an engine, but it cannot be read; "
            "build the engine again."
        ) from None
    facts = {
        "size": size_of(path),
        "builder": info.builder,
        "for": info.compute_capability,
        "from": info.onnx,
        "inputs": "; ".join(f"{name} {shape}" for name, shape in info.inputs.items()),
        "outputs": "; ".join(f"{name} {shape}" for name, shape in info.outputs.items()),
        "batch": " to ".join(map(str, dict.fromkeys(info.batch))),
        "layers": dict(Counter(info.built_formats.values()).most_common()),
        "fused kernels": len(fused(info.layers)),
        "fell back": ", ".join(info.fallbacks) or "none",
        "sidecar": "is the engine's"
        if sha256(path) == info.engine_sha256
        else "is of another engine: build it again",
    }
    rows = [
        {"layer": name, "planned": planned, "built": info.built_formats.get(name, "?")}
        for name, planned in info.formats.items()
    ]
    return Inspection(str(path), "engine", facts, rows)
