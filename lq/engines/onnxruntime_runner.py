"""Run an ONNX file with ONNX Runtime."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime as ort
import torch
from torch import Tensor

from lq.engines import cpu
from lq.engines.base import Runner, bind_inputs, check_shape
from lq.engines.cast_through import cast_through, has_16_bit
from lq.engines.kernels import encode_biases, encode_weights_unsigned
from lq.export.graph import load_graph, weights_mb
from lq.export.grid import code_type

log = logging.getLogger(__name__)
_FLOAT_8 = (ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2)
_DTYPES = {"tensor(float)": torch.float32, "tensor(int64)": torch.int64}


class OnnxRuntimeRunner(Runner):
    """An ONNX file in ONNX Runtime, computing the plan that the graph holds.

    By itself ONNX Runtime would also quantize, per tensor, the float weight of a layer that stands
    between Q/DQ. That is off, and the biases of quantized layers, which the same rewrite gives
    integer kernels, are encoded here.

    The CPU has no 16-bit kernels: there fp16 and bf16 layers run in float32 with operands and
    results rounded to 16 bits, and a log message says so.

    Args:
        path: An ONNX file.
        providers: Execution providers, best first; CUDA where present, else the CPU.
        optimize: Let ONNX Runtime fuse; ``False`` runs the graph node by node.
        threads: Threads within an operator; 0 is ONNX Runtime's own choice.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an ONNX model.
    """

    def __init__(
        self,
        path: str | Path,
        providers: list[str] | None = None,
        optimize: bool = True,
        threads: int = 0,
    ) -> None:
        model = load_graph(path)
        self.size_mb, self.weights_mb = Path(path).stat().st_size / 1e6, weights_mb(model)
        self._open(model, Path(path), providers, _options(optimize, threads))

    @classmethod
    def from_graph(cls, model: ir.Model, optimize: bool = True) -> OnnxRuntimeRunner:
        """Return a runner of a graph in memory."""
        runner = cls.__new__(cls)
        runner.size_mb = 0.0
        runner._open(model, None, None, _options(optimize, 0))
        return runner

    @classmethod
    def timed(cls, model: ir.Model, profile: str = "", threads: int = 0) -> OnnxRuntimeRunner:
        """Return a runner on the CPU of a graph in memory as it is, to be timed.

        16-bit layers are left to ONNX Runtime, which computes them in float32 between casts.

        Args:
            model: The graph.
            profile: Where the file of a profile is to lie, without its ending; none, if empty.
            threads: Threads within an operator; 0 is ONNX Runtime's own choice.
        """
        runner, options = cls.__new__(cls), _options(True, threads)
        runner.size_mb = 0.0
        if profile:
            options.enable_profiling, options.profile_file_prefix = True, profile
        runner._open(model, None, ["CPUExecutionProvider"], options, simulate=False)
        return runner

    def _open(
        self,
        model: ir.Model,
        path: Path | None,
        providers: list[str] | None,
        options: ort.SessionOptions,
        simulate: bool = True,
    ) -> None:
        self.providers = providers or _default_providers()
        on_cpu = self.providers == ["CPUExecutionProvider"]
        self.simulates = simulate and on_cpu and has_16_bit(model)
        if self.simulates:
            log.info("ONNX Runtime's CPU has no 16-bit kernels; rounding to 16 bits in float32.")
            model = cast_through(model)
        optimize = options.graph_optimization_level != ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        changed = (optimize and _suit_kernels(model)) or self.simulates
        self.session = ort.InferenceSession(
            _serialized(model) if changed or path is None else str(path),
            options,
            providers=self.providers,
            disabled_optimizers=_wrong_rewrites(model),
        )
        self.inputs = {i.name: i for i in self.session.get_inputs()}
        self.outputs = [o.name for o in self.session.get_outputs()]
        self.name = f"ONNX Runtime {'CPU' if on_cpu else self.providers[0][:-17]}"

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return all outputs for one batch."""
        feeds = {}
        for name, value in bind_inputs(list(self.inputs), args, kwargs).items():
            declared = self.inputs[name]
            check_shape(name, tuple(value.shape), declared.shape)
            dtype = _DTYPES.get(declared.type, value.dtype)
            feeds[name] = value.detach().to("cpu", dtype).numpy()
        return [torch.from_numpy(y) for y in self.session.run(self.outputs, feeds)]


def _suit_kernels(model: ir.Model) -> bool:
    """Change a graph for integer kernels, and return whether there was anything to change."""
    found = encode_biases(model.graph)
    # ONNX Runtime's own option for this (x64quantprecision) fails on shared constants.
    if cpu.first_hazard(model) is not None and cpu.saturates():
        encode_weights_unsigned(model.graph)
        found = True
    return found


def _wrong_rewrites(model: ir.Model) -> list[str]:
    """Return ONNX Runtime's rewrites that compute something else than the graph, or fail on it."""
    wrong = ["WeightBiasQuantization"]
    if any(code_type(node) in _FLOAT_8 for node in model.graph if node.op_type == "QuantizeLinear"):
        # Takes float8 for uint8, which needs no Relu before it; and fails on it.
        wrong += ["ReluQuantRewrite", "ClipQuantRewrite"]
    if (model.opset_imports.get("") or 0) >= 21:
        wrong.append("QDQPropagationTransformer")  # writes pairs whose two types contradict
    return wrong


def _options(optimize: bool, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return options


def _serialized(model: ir.Model) -> bytes:
    serialized: bytes = ir.to_proto(model).SerializeToString()
    return serialized


def _default_providers() -> list[str]:
    cuda = ["CUDAExecutionProvider"]
    available = ort.get_available_providers()
    return [p for p in cuda if p in available] + ["CPUExecutionProvider"]
