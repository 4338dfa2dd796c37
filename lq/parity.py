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
from lq.functional import encode, sqnr_db
from lq.quantizer import Mode, Quantizer
from lq.surgery import quantizers

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_CODE_DIFFERENCE = 1
MAX_CODE_SHARE = 1e-4
"""Per layer, both sides fed the same codes: at most this share of codes may differ."""
MIN_LAYER_SQNR_DB = 60.0
"""Per layer, likewise: what float32 sums in another order leave far behind, and no wrong weight."""
MIN_16_BIT_LAYER_SQNR_DB = 30.0
"""The same where layers round to 16 bits: bf16 keeps 8 of them."""
MIN_SQNR_DB = 15.0
"""End to end: one flipped code spreads, so the bound is loose."""
CONFIDENT_MARGIN = 0.1
"""A sample is confident if its two largest outputs differ by this share of its output range."""


@dataclass(frozen=True)
class LayerParity:
    """How far one layer or quantizer agrees, both sides fed the same codes before it.

    Attributes:
        layer: Name of the layer, whose output is compared, or of the quantizer, whose codes are.
        max_code_difference: Largest difference of codes; 0 for layers.
        differing: Codes that differ.
        total: Codes compared.
        sqnr_db: The layer's output against torch's; infinite for quantizers.
        min_sqnr_db: What it must reach.
    """

    layer: str
    max_code_difference: int = 0
    differing: int = 0
    total: int = 0
    sqnr_db: float = math.inf
    min_sqnr_db: float = MIN_LAYER_SQNR_DB

    @property
    def diverges(self) -> bool:
        """Whether the difference is beyond rounding."""
        allowed = max(MAX_CODE_SHARE * self.total, 1)
        return (
            self.max_code_difference > MAX_CODE_DIFFERENCE
            or self.differing > allowed
            or self.sqnr_db < self.min_sqnr_db
        )

    def worse(self, other: LayerParity) -> LayerParity:
        """Return the figures of two batches together."""
        return LayerParity(
            self.layer,
            max(self.max_code_difference, other.max_code_difference),
            self.differing + other.differing,
            self.total + other.total,
            min(self.sqnr_db, other.sqnr_db),
            self.min_sqnr_db,
        )


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
    cut = _CutGraph(ir.load(onnx))
    outputs = _Outputs()
    with eval_mode(model), quantizer_mode(model, Mode.QUANTIZE):
        for batch in batches:
            args, kwargs = model_inputs(model, batch)
            with _Recorder(model, {module for module, _ in cut.layers.values()}) as recorder:
                expected = tensors(model(*args, **kwargs))
            outputs.add(expected, whole.run(*args, **kwargs))
            cut.compare(recorder, args, kwargs)
    return outputs.report(list(cut.figures.values()), whole.simulates)


class _Recorder:
    """Keeps what quantizers are given and what layers return during one forward pass."""

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        modules = dict(model.named_modules())
        self.quantizers = {n: q for n, q in quantizers(model).items() if q.spec.axis is None}
        self.given: dict[str, list[Tensor]] = {name: [] for name in self.quantizers}
        self.layers = {name: modules[name] for name in layers if name in modules}
        self.returned: dict[str, list[Tensor]] = {name: [] for name in self.layers}

    def __enter__(self) -> _Recorder:
        # Cloned, for what comes after may change a tensor in place.
        self._hooks = [
            quantizer.register_forward_pre_hook(
                lambda _module, args, seen=self.given[name]: seen.append(args[0].detach().clone())
            )
            for name, quantizer in self.quantizers.items()
        ]
        for name, layer in self.layers.items():
            self._hooks.append(layer.register_forward_hook(self._keep(self.returned[name])))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    @staticmethod
    def _keep(seen: list[Tensor]) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen.append(output.detach().clone())

        return hook

    def call(self, node: str) -> tuple[Quantizer, Tensor]:
        """Return the quantizer a node is named after, and what its n-th call was given."""
        name, _, call = node.partition("@")
        return self.quantizers[name], self.given[name][int(call or 0)]

    def output(self, layer: str) -> Tensor | None:
        """Return what a layer returned, unless it was called several times."""
        returned = self.returned.get(layer, [])
        return returned[0] if len(returned) == 1 else None


class _CutGraph:
    """An exported graph cut at the QuantizeLinear of every activation.

    Each becomes an input, fed from torch. What the graph computes for it, the codes it makes of
    what it is fed, and the output of every layer become outputs.
    """

    def __init__(self, model: ir.Model) -> None:
        import onnx_ir as ir

        from lq.engines.onnxruntime_runner import OnnxRuntimeRunner
        from lq.export.passes import OUTPUT_OF, WEIGHTED

        graph = model.graph
        self.graph_inputs = [str(value.name) for value in graph.inputs]
        self.figures: dict[str, LayerParity] = {}
        self.layers: dict[str, tuple[str, str]] = {}
        self.computed: dict[str, str] = {}
        self.codes: dict[str, str] = {}
        for node in list(graph):
            name = str(node.name)
            module = node.metadata_props.get(OUTPUT_OF)
            if module is not None:
                layer = name if node.op_type in WEIGHTED else module
                self.layers[layer] = module, self._tap(graph, node.outputs[0])
                self.figures[layer] = LayerParity(layer)
            if node.op_type != "QuantizeLinear":
                continue
            value = node.inputs[0]
            assert value is not None
            fed = ir.Value(
                name=f"{name}/fed", type=ir.TensorType(ir.DataType.FLOAT), shape=value.shape
            )
            graph.inputs.append(fed)
            node.replace_input_with(0, fed)
            self.codes[name] = self._tap(graph, node.outputs[0])
            if value.producer() is not None:
                self.computed[name] = self._tap(graph, value)
            self.figures[name] = LayerParity(name)
        self.runner = OnnxRuntimeRunner.from_graph(model, optimize=False)
        self.min_sqnr_db = MIN_16_BIT_LAYER_SQNR_DB if self.runner.simulates else MIN_LAYER_SQNR_DB

    @staticmethod
    def _tap(graph: ir.Graph, value: ir.Value) -> str:
        if not value.is_graph_output():
            graph.outputs.append(value)
        return str(value.name)

    def compare(self, recorder: _Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Feed one batch to all pieces and compare what they compute with torch."""
        given = {name: recorder.call(name) for name in self.codes}
        feeds = {f"{name}/fed": x for name, (_, x) in given.items()}
        inputs = dict(zip(self.graph_inputs, args, strict=False)) | kwargs
        feeds |= {name: x for name, x in inputs.items() if name in self.runner.inputs}
        results = dict(zip(self.runner.outputs, self.runner.run(**feeds), strict=True))
        for name, (module, value) in self.layers.items():
            expected = recorder.output(module)
            if expected is not None and expected.shape == results[value].shape:
                sqnr = sqnr_db(expected.cpu(), results[value])
                self._note(LayerParity(name, sqnr_db=sqnr, min_sqnr_db=self.min_sqnr_db))
        for name, (quantizer, x) in given.items():
            expected = _codes(quantizer, x)
            self._note(_code_parity(name, expected, results[self.codes[name]].float()))
            if name in self.computed:
                computed = _codes(quantizer, results[self.computed[name]])
                self._note(_code_parity(name, expected, computed))

    def _note(self, found: LayerParity) -> None:
        self.figures[found.layer] = found.worse(self.figures[found.layer])


def _codes(quantizer: Quantizer, x: Tensor) -> Tensor:
    spec, scale = quantizer.spec, quantizer.scale
    assert scale is not None
    return encode(x.detach().cpu().float(), scale.detach().cpu(), spec.qmin, spec.qmax)


def _code_parity(name: str, expected: Tensor, got: Tensor) -> LayerParity:
    difference = (expected - got).abs()
    return LayerParity(name, int(difference.max()), int((difference > 0).sum()), difference.numel())


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
