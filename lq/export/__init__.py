"""From a quantized model to files: ONNX graphs with Q/DQ, a linter, and TensorRT engines."""

from lq.export.engine import build_engine
from lq.export.linter import Finding, lint
from lq.export.to_onnx import export_onnx
from lq.export.triton import triton_repository

__all__ = ["Finding", "build_engine", "export_onnx", "lint", "triton_repository"]
