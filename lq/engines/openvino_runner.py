"""Run an ONNX file with OpenVINO."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lq.engines import cpu
from lq.engines.base import Runner, bind_inputs, check_shape
from lq.engines.cast_through import has_16_bit
from lq.export.graph import load_graph, weights_mb
from lq.messages import suggest

INSTALL = "openvino is not installed; install it: pip install openvino (the extra openvino)."
HINTS = {"latency": "LATENCY", "throughput": "THROUGHPUT"}
PRECISIONS = {"fp32": "f32", "bf16": "bf16"}


class OpenVINORunner(Runner):
    """An ONNX file in OpenVINO, on the CPU; a graph with symmetric int8 Q/DQ runs as it is.

    Runs may be started from several threads at once, which is what ``hint="throughput"`` is for.

    Args:
        path: An ONNX file.
        hint: ``"latency"`` gives one batch all threads; ``"throughput"`` shares them between
            several batches at a time.
        threads: Threads in all; 0 is OpenVINO's own choice.
        precision: What float layers compute in: ``"fp32"``, or ``"bf16"`` where the processor has
            it. OpenVINO's own choice would be bf16 there, whatever the graph says.

    Raises:
        FileNotFoundError: If there is no such file.
        ImportError: If OpenVINO is not installed, naming the extra.
        RuntimeError: If the processor has no VNNI and a layer's integer products could saturate.
        ValueError: If it is not an ONNX model, or a hint or precision is unknown.
    """

    def __init__(
        self,
        path: str | Path,
        hint: str = "latency",
        threads: int = 0,
        precision: str = "fp32",
    ) -> None:
        _check("hint", hint, HINTS)
        _check("precision", precision, PRECISIONS)
        model = load_graph(path)
        _refuse_saturation(path, cpu.first_hazard(model))
        self.simulates = has_16_bit(model)  # computed in float32
        self.size_mb, self.weights_mb = Path(path).stat().st_size / 1e6, weights_mb(model)
        self._compile(path, hint, threads, precision)

    def _compile(self, path: str | Path, hint: str, threads: int, precision: str) -> None:
        self.name = "OpenVINO CPU" if precision == "fp32" else f"OpenVINO CPU {precision}"
        config = {
            "PERFORMANCE_HINT": HINTS[hint],
            "INFERENCE_PRECISION_HINT": PRECISIONS[precision],
        }
        if threads:
            config["INFERENCE_NUM_THREADS"] = str(threads)
        self.compiled = _openvino().Core().compile_model(str(path), "CPU", config)
        self.inputs = {port.get_any_name(): port for port in self.compiled.inputs}
        self._requests = threading.local()

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return all outputs for one batch."""
        feeds = {}
        for name, value in bind_inputs(list(self.inputs), args, kwargs).items():
            port = self.inputs[name]
            shape = [-1 if size.is_dynamic else size.get_length() for size in port.partial_shape]
            check_shape(name, tuple(value.shape), shape)
            feeds[name] = value.detach().cpu().numpy().astype(port.element_type.to_dtype())
        results = self._request().infer(feeds)
        return [torch.from_numpy(results[port].copy()) for port in self.compiled.outputs]

    def _request(self) -> Any:
        """Return this thread's own request: one cannot serve two."""
        if not hasattr(self._requests, "mine"):
            self._requests.mine = self.compiled.create_infer_request()
        return self._requests.mine


def _openvino() -> Any:
    try:
        import openvino
    except ImportError:
        raise ImportError(f"Cannot run a file with OpenVINO: {INSTALL}") from None
    return openvino


def _check(name: str, given: str, valid: dict[str, str]) -> None:
    if given not in valid:
        raise ValueError(
            f"Expected `{name}` to be one of {', '.join(valid)}, but got {given!r}; "
            f"{suggest(given, valid)}"
        )


def _refuse_saturation(path: str | Path, layer: str | None) -> None:
    if layer is not None and cpu.saturates():
        raise RuntimeError(
            f"Expected a processor with VNNI to run {str(path)!r} with OpenVINO, but this one has "
            f"none: its 16-bit sums would saturate in layer {layer!r}. Run it with ONNX Runtime "
            "(engine='onnxruntime'), which then uses other kernels."
        )
