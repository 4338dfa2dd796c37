"""Run a TensorRT or TensorRT-RTX engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lq.engines.base import Runner, bind_inputs, check_shape
from lq.export.engine import INSTALL, EngineInfo, capability_at_hand, find_builder, logger


class TensorRTRunner(Runner):
    """A built engine on the GPU it was built for.

    Args:
        path: An engine that ``build_engine`` wrote, its JSON sidecar beside it.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If no TensorRT is installed, naming the extras.
        RuntimeError: If there is no GPU, or the engine was built for another one, or by another
            version.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"Expected an engine at {str(path)!r}, but there is no file.")
        trt = find_builder()
        if trt is None:
            raise ImportError(f"Cannot run {str(path)!r}: {INSTALL}")
        _check_sidecar(path, f"{trt.__name__} {trt.__version__}")
        self.trt = trt
        self.name = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}[trt.__name__]
        self.size_mb = path.stat().st_size / 1e6
        engine = trt.Runtime(logger(trt)).deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise RuntimeError(f"Cannot load {str(path)!r}: {logger(trt).errors()}")
        self.engine, self.context = engine, engine.create_execution_context()
        self.stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        mode = {name: engine.get_tensor_mode(name) for name in names}
        self.inputs = [n for n in names if mode[n] == trt.TensorIOMode.INPUT]
        self.outputs = [n for n in names if mode[n] == trt.TensorIOMode.OUTPUT]

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return all outputs for one batch, on the GPU."""
        self.stream.wait_stream(torch.cuda.current_stream())
        kept = []
        for name, value in bind_inputs(self.inputs, args, kwargs).items():
            check_shape(name, tuple(value.shape), list(self.engine.get_tensor_shape(name)))
            given = value.detach().to("cuda", self._dtype(name)).contiguous()
            kept.append(given)  # alive until the engine is done
            if not self.context.set_input_shape(name, tuple(given.shape)):
                raise ValueError(
                    f"Expected a shape that the engine was built for, but got {list(given.shape)}; "
                    "build it with another `batch` or `image`."
                )
            self.context.set_tensor_address(name, given.data_ptr())
        results = []
        for name in self.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            results.append(torch.empty(shape, dtype=self._dtype(name), device="cuda"))
            self.context.set_tensor_address(name, results[-1].data_ptr())
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError(f"TensorRT cannot run: {logger(self.trt).errors()}")
        self.stream.synchronize()
        return results

    def _dtype(self, name: str) -> torch.dtype:
        types = self.trt.DataType
        return {
            types.FLOAT: torch.float32,
            types.HALF: torch.float16,
            types.BF16: torch.bfloat16,
            types.INT8: torch.int8,
            types.INT32: torch.int32,
            types.INT64: torch.int64,
            types.BOOL: torch.bool,
        }[self.engine.get_tensor_dtype(name)]


def _check_sidecar(path: Path, builder: str) -> None:
    """Refuse an engine that another version built, or that was built for another GPU."""
    sidecar = EngineInfo.path_of(path)
    built = json.loads(sidecar.read_text()) if sidecar.is_file() else {}
    if built and built.get("builder") != builder:
        raise RuntimeError(
            f"{str(path)!r} was built by {built.get('builder')}, but {builder} is installed; "
            "engines run only with the version that built them. Build it again from its ONNX file."
        )
    at_hand = capability_at_hand()
    if at_hand is None:
        raise RuntimeError(f"Cannot run {str(path)!r}: TensorRT engines need an NVIDIA GPU.")
    if built and built.get("compute_capability") != at_hand:
        raise RuntimeError(
            f"{str(path)!r} was built for {built.get('compute_capability')}, but the GPU here is "
            f"{at_hand}; build it again here from its ONNX file."
        )
