"""Does an exported file compute what the torch model computes, layer by layer and end to end?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lq.agreement import MIN_ENGINE_SQNR_DB, Agreement, OutputComparison
from lq.batches import check_batches, model_inputs, tensors
from lq.engines import Runner, open_engine
from lq.layer_parity import CutGraph, LayerParity, Recorder
from lq.modes import eval_mode, quantizer_mode
from lq.quantizer import Mode


@dataclass(frozen=True)
class ParityReport(Agreement):
    """How far a file agrees with its model.

    The figures of ``Agreement`` are those of the graph run node by node, or of the engine that
    was asked for.

    Attributes:
        max_code_difference: Largest difference of codes in any layer, fed the same codes.
        first_divergence: First layer beyond tolerance, ``None`` when all agree.
        cast_through: Whether 16-bit layers ran in float32 with operands and results rounded, for
            want of 16-bit kernels on the CPU.
        optimized: The same file with ONNX Runtime's own fusions and kernels.
        layers: The figures of every layer and quantizer, in the order they run.
    """

    max_code_difference: int = 0
    first_divergence: str | None = None
    cast_through: bool = False
    optimized: Agreement | None = None
    layers: list[LayerParity] = field(repr=False, default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether file and model agree within tolerance, ONNX Runtime's fusions left aside."""
        return self.first_divergence is None and super().passed

    @property
    def fused_passed(self) -> bool:
        """Whether the optimized session, where there is one, agrees within its own limits."""
        return self.optimized is None or self.optimized.passed

    def summary(self) -> str:
        """Return the report in a line."""
        if not self.layers:
            return super().summary()
        where = f", first diverging layer {self.first_divergence!r}" * bool(self.first_divergence)
        how = "; 16-bit layers rounded in float32" * self.cast_through
        fused = f"; optimized session {self.optimized.sqnr_db:.1f} dB" if self.optimized else ""
        return (
            f"{super().summary()}, codes differ by at most {self.max_code_difference} per layer"
            f"{where}{how}{fused}"
        )


def parity(
    model: nn.Module, onnx: str | Path | Runner, batches: Iterable[Any], engine: str | None = None
) -> ParityReport:
    """Compare a model with the ONNX file exported from it, on real batches.

    **Per layer**, the graph is cut at every QuantizeLinear of an activation and each piece is fed
    what torch has there, so that differences do not add up: codes may differ by at most 1, in at
    most 1e-4 of the elements (1e-2 behind 16-bit layers), those aside that torch rounds within a
    thousandth of a step of the edge between two codes, and the SQNR of every layer's output must be
    at least 60 dB, 30 where layers are 16-bit. **End to end**, the largest output must be the same
    on all confident samples, and the SQNR at least 15 dB. ONNX Runtime's own rewrites are off;
    ``report.optimized`` measures the session with them, whose limits are the same top-1 and 10 dB.

    An engine is compared end to end, with the limits of the optimized session.

    Args:
        model: The model that was exported.
        onnx: The exported file; or an ``.engine`` built from it, or an open runner.
        batches: Batches as for ``calibrate``.
        engine: ``"onnxruntime"`` or ``"openvino"``, to compare what that engine makes of the file.

    Raises:
        ValueError: If `batches` is empty.
        RuntimeError: Beyond tolerance, naming the first diverging layer.

    Example:
        >>> import lq, tempfile, torch
        >>> model = lq.quantize(nn.Linear(16, 4), "tensorrt_int8")
        >>> batches = [torch.linspace(-1, 1, 64).view(4, 16)]
        >>> path = Path(tempfile.mkdtemp()) / "linear.onnx"
        >>> lq.calibrate(model, batches, progress=False).training
        True
        >>> _ = lq.export_onnx(model, batches[0], path)
        >>> parity(model, path, batches).top1_agreement
        1.0
    """
    check_batches(batches)
    if engine is None and isinstance(onnx, (str, Path)) and Path(onnx).suffix == ".onnx":
        report = compare(model, onnx, batches)
    else:
        report = compare_engine(model, open_engine(onnx, engine), batches)
    if not report.passed:
        file = report.engine if isinstance(onnx, Runner) else repr(str(onnx))
        raise RuntimeError(f"{file} differs from the model: {report.summary()}.")
    return report


def compare(model: nn.Module, onnx: str | Path, batches: Iterable[Any]) -> ParityReport:
    """Return how far a file agrees with its model, without judging it (see ``parity``)."""
    import onnx_ir as ir

    from lq.engines.onnxruntime_runner import OnnxRuntimeRunner

    whole, fused = (
        OnnxRuntimeRunner(onnx, providers=["CPUExecutionProvider"], optimize=optimize)
        for optimize in (False, True)
    )
    cut = CutGraph(ir.load(onnx))
    as_is = OutputComparison(whole.name)
    optimized = OutputComparison(f"{fused.name}, optimized", MIN_ENGINE_SQNR_DB)
    for args, kwargs, expected, recorder in _recorded(model, batches, cut):
        as_is.add(expected, whole.run(*args, **kwargs))
        optimized.add(expected, fused.run(*args, **kwargs))
        cut.compare(recorder, args, kwargs)
    layers = list(cut.figures.values())
    return ParityReport(
        **dataclasses.asdict(as_is.result()),
        max_code_difference=max((layer.max_code_difference for layer in layers), default=0),
        first_divergence=next((layer.layer for layer in layers if layer.diverges), None),
        cast_through=whole.simulates,
        optimized=optimized.result(),
        layers=layers,
    )


def compare_engine(model: nn.Module, engine: Runner, batches: Iterable[Any]) -> ParityReport:
    """Return how far an engine's outputs agree with the model's, without judging it."""
    comparison = OutputComparison(engine.name, MIN_ENGINE_SQNR_DB)
    with eval_mode(model), quantizer_mode(model, Mode.QUANTIZE):
        for batch in batches:
            args, kwargs = model_inputs(model, batch)
            expected = tensors(model(*args, **kwargs))
            args, kwargs = model_inputs(model, batch)  # the model may have changed them
            comparison.add(expected, engine.run(*args, **kwargs))
    return ParityReport(**dataclasses.asdict(comparison.result()), cast_through=engine.simulates)


def _recorded(
    model: nn.Module, batches: Iterable[Any], cut: CutGraph
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], list[Tensor], Recorder]]:
    """Yield each batch's inputs, the model's outputs, and what happened in between."""
    layers = {module for module, _ in cut.layers.values()}
    with eval_mode(model), quantizer_mode(model, Mode.QUANTIZE):
        for batch in batches:
            args, kwargs = model_inputs(model, batch)
            with Recorder(model, layers) as recorder:
                expected = tensors(model(*args, **kwargs))
            args, kwargs = model_inputs(model, batch)  # the model may have changed them
            yield args, kwargs, expected, recorder
