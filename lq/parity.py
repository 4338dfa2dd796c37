"""Does an exported file compute what the torch model computes, layer by layer and end to end?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lq.calibration import eval_mode, model_inputs, quantizer_mode
from lq.engines.base import tensors
from lq.functional import encode
from lq.quantizer import Mode, Quantizer
from lq.surgery import quantizers

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_CODE_DIFFERENCE = 1
MAX_CODE_SHARE = 1e-4
"""Per layer, both sides fed the same codes: at most this share of codes may differ."""
MIN_SQNR_DB = 15.0
"""End to end: one flipped code spreads, so the bound is loose; a wrong layer falls far below."""
CONFIDENT_MARGIN = 0.1
"""A sample is confident if its two largest outputs differ by this share of its output range."""


@dataclass(frozen=True)
class LayerParity:
    """How far one quantizer's input agrees, both sides fed the same codes before it.

    Attributes:
        quantizer: Name of the quantizer whose codes are compared.
        layer: Name of the layer that computed them.
        max_code_difference: Largest difference of codes.
        differing: Codes that differ.
        total: Codes compared.
    """

    quantizer: str
    layer: str
    max_code_difference: int
    differing: int
    total: int

    @property
    def diverges(self) -> bool:
        """Whether the difference is beyond rounding."""
        allowed = max(MAX_CODE_SHARE * self.total, 1)
        return self.max_code_difference > MAX_CODE_DIFFERENCE or self.differing > allowed


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
        layers: Every quantizer's figures, in the order they run.
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
    most 1e-4 of the elements (rounding ties). **End to end**, the largest output must be the same
    on all confident samples, and the SQNR at least 15 dB. ONNX Runtime's own rewrites are off.

    Args:
        model: The model that was exported.
        onnx: The exported file.
        batches: Batches as for ``calibrate``.

    Raises:
        ValueError: If `batches` is empty.
        RuntimeError: Beyond tolerance, naming the first diverging layer.
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
    cut = _CutGraph(ir.load(onnx))
    outputs = _Outputs()
    with eval_mode(model), quantizer_mode(model, Mode.QUANTIZE):
        for batch in batches:
            args, kwargs = model_inputs(model, batch)
            with _Recorder(model) as recorder:
                expected = tensors(model(*args, **kwargs))
            outputs.add(expected, whole.run(*args, **kwargs))
            cut.compare(recorder, args, kwargs)
    return outputs.report(cut.layers(), whole.cast_through)


class _Recorder:
    """Keeps what every quantizer of a model is given during one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.quantizers = {n: q for n, q in quantizers(model).items() if q.spec.axis is None}
        self.seen: dict[str, list[Tensor]] = {name: [] for name in self.quantizers}

    def __enter__(self) -> _Recorder:
        self._hooks = [
            quantizer.register_forward_pre_hook(self._keep(self.seen[name]))
            for name, quantizer in self.quantizers.items()
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @staticmethod
    def _keep(seen: list[Tensor]) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0].detach())

        return hook


class _CutGraph:
    """An exported graph cut at the QuantizeLinear of every activation.

    Each becomes an input, fed from torch, and what the graph computes for it becomes an output.
    """

    def __init__(self, model: ir.Model) -> None:
        import onnx_ir as ir

        from lq.engines.onnxruntime_runner import OnnxRuntimeRunner

        self.computed: dict[str, str] = {}
        self._worst: dict[str, LayerParity] = {}
        self._layer: dict[str, str] = {}
        graph = model.graph
        self.graph_inputs = [str(value.name) for value in graph.inputs]
        for node in [n for n in graph if n.op_type == "QuantizeLinear"]:
            value, name = node.inputs[0], str(node.name)
            assert value is not None
            self._layer[name] = _layer_before(value)
            fed = ir.Value(
                name=f"{name}/fed", type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape
            )
            graph.inputs.append(fed)
            node.replace_input_with(0, fed)
            if value.producer() is not None:
                if not value.is_graph_output():
                    graph.outputs.append(value)
                self.computed[name] = str(value.name)
        self.runner = OnnxRuntimeRunner.from_graph(model, optimize=False)
        self.names = [name for name in self._layer if f"{name}/fed" in self.runner.inputs]

    def compare(self, recorder: _Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Feed one batch to all pieces and compare their codes with torch's."""
        if not self.computed:
            return
        given = {name: _nth_call(recorder, name) for name in self.names}
        feeds = {f"{name}/fed": x for name, (_, x) in given.items()}
        inputs = dict(zip(self.graph_inputs, args, strict=False)) | kwargs
        feeds |= {name: x for name, x in inputs.items() if name in self.runner.inputs}
        results = dict(zip(self.runner.outputs, self.runner.run(**feeds), strict=True))
        for name, value in self.computed.items():
            quantizer, x = given[name]
            self._note(name, quantizer, x.cpu(), results[value])

    def _note(self, name: str, quantizer: Quantizer, expected: Tensor, got: Tensor) -> None:
        spec, scale = quantizer.spec, quantizer.scale
        assert scale is not None
        scale = scale.detach().cpu()
        difference = (
            encode(expected.float(), scale, spec.qmin, spec.qmax)
            - encode(got.float(), scale, spec.qmin, spec.qmax)
        ).abs()
        before = self._worst.get(name)
        self._worst[name] = LayerParity(
            quantizer=name,
            layer=self._layer[name],
            max_code_difference=max(
                int(difference.max()), before.max_code_difference if before else 0
            ),
            differing=int((difference > 0).sum()) + (before.differing if before else 0),
            total=difference.numel() + (before.total if before else 0),
        )

    def layers(self) -> list[LayerParity]:
        """Return the figures of all quantizers in the order of the graph."""
        return list(self._worst.values())


def _nth_call(recorder: _Recorder, node: str) -> tuple[Quantizer, Tensor]:
    """Return the quantizer a node is named after, and what its n-th call was given."""
    name, _, call = node.partition("@")
    return recorder.quantizers[name], recorder.seen[name][int(call or 0)]


def _layer_before(value: ir.Value) -> str:
    """Return the name of the layer whose result a value is, the nearest that multiplies."""
    from lq.export.passes import WEIGHTED

    node = value.producer()
    while node is not None and node.op_type not in WEIGHTED:
        above = [i.producer() for i in node.inputs if i is not None and i.producer() is not None]
        node = above[0] if above else None
    return str(node.name) if node is not None else str(value.name)


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
        ours, theirs = expected[0].cpu().flatten(1), got[0].cpu().flatten(1)
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
