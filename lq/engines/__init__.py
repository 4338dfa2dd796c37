"""Run a model from whatever it is stored as, through one interface."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from lq.engines.base import Runner
from lq.engines.torch_runner import TorchRunner
from lq.messages import suggest


def open_engine(
    model: nn.Module | str | Path | Runner, engine: str | None = None, threads: int = 0
) -> Runner:
    """Return the runner of a torch model, an ``.onnx`` file or an ``.engine``.

    The runners' own classes take what is particular to each.

    Args:
        model: A module, the path of a file, or a runner, which is returned.
        engine: What runs an ``.onnx`` file: ``"onnxruntime"``, unless said otherwise, or
            ``"openvino"``.
        threads: Threads of the processor; 0 is the engine's own choice.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For another kind of file, an engine that does not run it, or threads for what
            is open already or runs on a GPU.

    Example:
        >>> open_engine(nn.Linear(2, 2)).name
        'torch'
    """
    if engine is not None and engine not in ONNX_ENGINES:
        raise ValueError(
            f"Expected `engine` to be a known one, but got {engine!r}; "
            f"{suggest(engine, ONNX_ENGINES)}"
        )
    if isinstance(model, (str, Path)) and Path(model).suffix == ".onnx":
        return ONNX_ENGINES[engine or "onnxruntime"](model, threads)
    if engine is not None:
        raise ValueError(f"Expected an .onnx file for engine {engine!r}, but got {model!r}.")
    if isinstance(model, nn.Module):
        return TorchRunner(model, threads)
    if threads:
        raise ValueError(
            f"Expected `threads` to be 0 but for a torch model or an .onnx file, but got {threads}."
        )
    if isinstance(model, Runner):
        return model
    if Path(model).suffix in (".engine", ".plan", ".trt"):
        from lq.engines.tensorrt_runner import TensorRTRunner

        return TensorRTRunner(model)
    raise ValueError(
        f"Expected a torch model, an .onnx file or an .engine, but got {str(model)!r}."
    )


def _onnxruntime(path: str | Path, threads: int) -> Runner:
    from lq.engines.onnxruntime_runner import OnnxRuntimeRunner

    return OnnxRuntimeRunner(path, threads=threads)


def _openvino(path: str | Path, threads: int) -> Runner:
    from lq.engines.openvino_runner import OpenVINORunner

    return OpenVINORunner(path, threads=threads)


ONNX_ENGINES: dict[str, Callable[[str | Path, int], Runner]] = {
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
}
"""Engines that run an ONNX file. A new one is a runner and a row here."""

__all__ = ["Runner", "open_engine"]
