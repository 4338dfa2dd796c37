"""Bring along what other toolkits have quantized: their models, checkpoints and ONNX files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lq.interop.reading import GraphLayer, QuantizedGraph, TensorRange, read_onnx

__all__ = ["GraphLayer", "QuantizedGraph", "TensorRange", "read_onnx"]

# Resolved on first use: the one wants onnx, which the other does without.
_LAZY = {
    **dict.fromkeys(("GraphLayer", "QuantizedGraph", "TensorRange", "read_onnx"), "reading"),
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(f"lq.interop.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'lq.interop' has no attribute {name!r}")
