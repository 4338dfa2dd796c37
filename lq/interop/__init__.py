"""Bring along what other toolkits have quantized: their models, checkpoints and ONNX files."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lq.interop.converting import not_converted
    from lq.interop.modelopt import from_modelopt, to_modelopt
    from lq.interop.pytorch_quantization import from_pytorch_quantization
    from lq.interop.reading import GraphLayer, QuantizedGraph, TensorRange, read_onnx

__all__ = [
    "GraphLayer",
    "QuantizedGraph",
    "TensorRange",
    "from_modelopt",
    "from_pytorch_quantization",
    "not_converted",
    "read_onnx",
    "to_modelopt",
]

# Resolved on first use: some want onnx, which the others do without.
_LAZY = {
    **dict.fromkeys(("GraphLayer", "QuantizedGraph", "TensorRange", "read_onnx"), "reading"),
    "from_modelopt": "modelopt",
    "from_pytorch_quantization": "pytorch_quantization",
    "not_converted": "converting",
    "to_modelopt": "modelopt",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(f"lq.interop.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'lq.interop' has no attribute {name!r}")
