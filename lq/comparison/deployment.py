"""How models are exported and run in a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lq.export import build_engine, export_onnx
from lq.latency import engine_at_hand, hardware_name


class Deployment:
    """What models are exported for, and what runs them here.

    Without a GPU, or without a builder, files for TensorRT run in ONNX Runtime, which computes the
    same integers; their time is not TensorRT's, so it is not measured.

    Args:
        target: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        largest: The largest batch that will run.
    """

    def __init__(self, target: str, largest: int) -> None:
        builds = engine_at_hand() == "tensorrt"
        self.target, self.largest = target, largest
        self.builds = target == "tensorrt" and builds
        self.is_timed = target != "tensorrt" or builds
        self.engine = "openvino" if target == "openvino" else "onnxruntime"

    @property
    def hardware(self) -> str:
        """What runs the models."""
        return hardware_name("tensorrt" if self.builds else self.engine)

    def export(self, model: nn.Module, sample: Any, path: Path, batches: Sequence[Any]) -> Path:
        """Export a model, and return the file that runs.

        Args:
            model: A float model, or a quantized and calibrated one.
            sample: One batch.
            path: ONNX file to write.
            batches: Batches for the parity check.
        """
        export_onnx(model, sample, path, self.target, batches)
        if not self.builds:
            return path
        build_engine(path, path.with_suffix(".engine"), (1, self.largest, self.largest))
        return path.with_suffix(".engine")

    def engine_of(self, path: Path) -> str | None:
        """Return what runs a file, as ``lq.evaluate`` takes it."""
        return self.engine if path.suffix == ".onnx" else None
