"""Run a model from whatever it is stored as, through one interface."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lq.engines.base import Runner
from lq.engines.torch_runner import TorchRunner


def open_engine(model: nn.Module | str | Path | Runner) -> Runner:
    """Return the runner of a torch model, an ``.onnx`` file or an ``.engine``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For another kind of file.

    Example:
        >>> open_engine(nn.Linear(2, 2)).name
        'torch'
    """
    if isinstance(model, Runner):
        return model
    if isinstance(model, nn.Module):
        return TorchRunner(model)
    suffix = Path(model).suffix
    if suffix == ".onnx":
        from lq.engines.onnxruntime_runner import OnnxRuntimeRunner

        return OnnxRuntimeRunner(model)
    if suffix in (".engine", ".plan", ".trt"):
        from lq.engines.tensorrt_runner import TensorRTRunner

        return TensorRTRunner(model)
    raise ValueError(
        f"Expected a torch model, an .onnx file or an .engine, but got {str(model)!r}."
    )


__all__ = ["Runner", "open_engine"]
