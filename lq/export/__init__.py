"""From a quantized model to files: ONNX graphs with Q/DQ, and TensorRT engines."""

from lq.export.engine import build_engine
from lq.export.to_onnx import export_onnx

__all__ = ["build_engine", "export_onnx"]
