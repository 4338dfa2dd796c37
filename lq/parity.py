"""Does an exported file compute what the torch model computes, layer by layer and end to end?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq.batches import model_inputs, tensors
from lq.layer_parity import CutGraph, LayerParity, Recorder
from lq.modes import eval_mode, quantizer_mode
from lq.quantizer import Mode

MIN_SQNR_DB = 15.0
"""End to end: one flipped code spreads, so the bound is loose."""
CONFIDENT_MARGIN = 0.1
"""A sample is confident if its two largest outputs differ by this share of its output range."""


@dataclass(frozen=True)
class ParityReport:
    """How far a file agrees with its model.

    Attributes:
        n: Samples compared.
        top1_agreement: Share of samples with the same largest output.
        confident_agreement: The same over confident samples.
        max_difference: Largest absolute difference of outputs.
        mean_difference: Mean absolute difference of outputs.
        sqnr_db: Outputs of the file against those of the model.
        max_code_difference: Largest difference of codes in any layer, fed the same codes.
        cast_through: Whether 16-bit layers ran in float32 with operands and results rounded, for
            want of 16-bit kernels on the CPU.
        first_divergence: First layer beyond tolerance, ``None`` when all agree.
        layers: The figures of every layer and quantizer, in the order they run.
    """

    n: int
    top1_agreement: float
    confident_agreement: float
    max_difference: float
    mean_difference: float
    sqnr_db: float
    max_code_difference: int
    first_divergence: str | None
    cast_through: bool = False
    layers: list[LayerParity] = field(repr=False, default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether file and model agree within tolerance."""
        return (
            self.first_divergence is None
            and self.confident_agreement == 1.0
            and self.sqnr_db >= MIN_SQNR_DB
        )

    def summary(self) -> str:
        """Return the report in a line."""
        where = f", first diverging layer {self.first_divergence!r}" * bool(self.first_divergence)
        how = "; 16-bit layers rounded in float32" * self.cast_through
        return (
            f"{self.n} samples, top-1 agreement {self.top1_agreement:.2%} "
            f"(confident samples {self.confident_agreement:.2%}), output difference max "
            f"{self.max_difference:.2g} mean {self.mean_difference:.2g}, SQNR {self.sqnr_db:.1f} "
            f"dB, codes differ by at most {self.max_code_difference} per layer{where}{how}"
        )


def parity(model: nn.Module, onnx: str | Path, batches: Iterable[Any]) -> ParityReport:
    """Compare a model with the ONNX file exported from it, on real batches.

    **Per layer**, the graph is cut at every QuantizeLinear of an activation and each piece is fed
    what torch has there, so that differences do not add up: codes may differ by at most 1, in at
    most 1e-4 of the elements (rounding ties), and the SQNR of every layer's output must be at
    least 60 dB, 30 where layers are 16-bit. **End to end**, the largest output must be the same
    on all confident samples, and the SQNR at least 15 dB. ONNX Runtime's own rewrites are off.

    Args:
        model: The model that was exported.
        onnx: The exported file.
        batches: Batches as for ``calibrate``.

    Raises:
        ValueError: If `batches` is empty.
        RuntimeError: Beyond tolerance, naming the first diverging layer.

    Example:
        >>> import lq, tempfile
        >>> model = lq.quantize(nn.Linear(16, 4), "tensorrt_int8")
        >>> batches = [torch.linspace(-1, 1, 64).view(4, 16)]
        >>> path = Path(tempfile.mkdtemp()) / "linear.onnx"
        >>> lq.calibrate(model, batches, progress=False).training
        True
        >>> _ = lq.export_onnx(model, batches[0], path)
        >>> parity(model, path, batches).top1_agreement
        1.0
    """
    report = compare(model, onnx, batches)
    if not report.passed:
        raise RuntimeError(f"{str(onnx)!r} differs from the model: {report.summary()}.")
    return report


def compare(model: nn.Module, onnx: str | Path, batches: Iterable[Any]) -> ParityReport:
    """Return how far a file agrees with its model, without judging it (see ``parity``)."""
    import onnx_ir as ir

    from lq.engines.onnxruntime_runner import OnnxRuntimeRunner

    whole = OnnxRuntimeRunner(onnx, providers=["CPUExecutionProvider"], optimize=False)
    cut = CutGraph(ir.load(onnx))
    outputs = _Outputs()
    with eval_mode(model), quantizer_mode(model, Mode.QUANTIZE):
        for batch in batches:
            args, kwargs = model_inputs(model, batch)
            with Recorder(model, {module for module, _ in cut.layers.values()}) as recorder:
                expected = tensors(model(*args, **kwargs))
            outputs.add(expected, whole.run(*args, **kwargs))
            cut.compare(recorder, args, kwargs)
    return outputs.report(list(cut.figures.values()), whole.simulates)


class _Outputs:
    """Adds up how the outputs of two sides differ, in constant memory."""

    def __init__(self) -> None:
        self.agree = self.confident = self.confident_agree = self.n = self.elements = 0
        self.max_difference = self.sum_difference = self.signal = self.noise = 0.0

    def add(self, expected: list[Tensor], got: list[Tensor]) -> None:
        """Take note of one batch."""
        for ours, theirs in zip(expected, got, strict=True):
            ours, difference = ours.cpu().double(), (ours.cpu().double() - theirs.cpu().double())
            self.elements += ours.numel()
            self.max_difference = max(self.max_difference, float(difference.abs().max()))
            self.sum_difference += float(difference.abs().sum())
            self.signal += float(ours.square().sum())
            self.noise += float(difference.square().sum())
        ours, theirs = (side[0].cpu().reshape(len(side[0]), -1) for side in (expected, got))
        same, confident = ours.argmax(1) == theirs.argmax(1), _is_confident(ours)
        self.n += len(ours)
        self.agree += int(same.sum())
        self.confident += int(confident.sum())
        self.confident_agree += int((same & confident).sum())

    def report(self, layers: list[LayerParity], cast_through: bool) -> ParityReport:
        """Return the figures over all batches."""
        if not self.n:
            raise ValueError("Expected `batches` to hold at least one sample, but got none.")
        return ParityReport(
            n=self.n,
            top1_agreement=self.agree / self.n,
            confident_agreement=self.confident_agree / self.confident if self.confident else 1.0,
            max_difference=self.max_difference,
            mean_difference=self.sum_difference / self.elements,
            sqnr_db=10 * math.log10(self.signal / self.noise) if self.noise else math.inf,
            max_code_difference=max((layer.max_code_difference for layer in layers), default=0),
            first_divergence=next((layer.layer for layer in layers if layer.diverges), None),
            cast_through=cast_through,
            layers=layers,
        )


def _is_confident(outputs: Tensor) -> Tensor:
    if outputs.shape[1] < 2:
        return torch.ones(len(outputs), dtype=torch.bool)
    best, second = outputs.topk(2, dim=1).values.unbind(1)
    spread = outputs.amax(1) - outputs.amin(1)
    return best - second > CONFIDENT_MARGIN * spread
