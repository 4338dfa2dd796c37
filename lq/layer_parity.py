"""Does each layer of an exported graph compute what it computes in torch, fed the same codes?"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lq.functional import FP8_MAX, encode, sqnr_db
from lq.quantizer import Quantizer
from lq.sites import OUTPUT
from lq.surgery import quantizers

if TYPE_CHECKING:
    import onnx_ir as ir

MAX_CODE_DIFFERENCE = 1
MAX_CODE_SHARE = 1e-4
"""Per layer, both sides fed the same codes: at most this share of codes may differ."""
TIE = 1e-3
"""A value so near to the edge between two codes, in steps, may be rounded either way."""
MIN_LAYER_SQNR_DB = 60.0
"""Per layer, likewise: what float32 sums in another order leave far behind, and no wrong weight."""
MIN_16_BIT_LAYER_SQNR_DB = 30.0
"""The same where layers round to 16 bits: bf16 keeps 8 of them."""
MAX_16_BIT_CODE_SHARE = 1e-2
"""The same share behind layers that round to 16 bits, where sums in another order flip steps that
are up to half a step of int8."""


@dataclass(frozen=True)
class LayerParity:
    """How far one layer or quantizer agrees, both sides fed the same codes before it.

    Attributes:
        layer: Name of the layer, whose output is compared, or of the quantizer, whose codes are.
        max_code_difference: Largest difference of codes; 0 for layers.
        differing: Codes that differ, where torch's value does not lie right between two.
        total: Codes compared.
        sqnr_db: The layer's output against torch's; infinite for quantizers.
        min_sqnr_db: What it must reach.
        max_share: Share of codes that may differ.
    """

    layer: str
    max_code_difference: int = 0
    differing: int = 0
    total: int = 0
    sqnr_db: float = math.inf
    min_sqnr_db: float = MIN_LAYER_SQNR_DB
    max_share: float = MAX_CODE_SHARE

    @property
    def diverges(self) -> bool:
        """Whether the difference is beyond rounding."""
        allowed = max(self.max_share * self.total, 1)
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
            max(self.max_share, other.max_share),
        )


class Recorder:
    """Keeps what quantizers are given and what layers return during one forward pass."""

    def __init__(self, model: nn.Module, layers: Iterable[str]) -> None:
        modules = dict(model.named_modules())
        self.quantizers = {n: q for n, q in quantizers(model).items() if q.spec.axis is None}
        self.given: dict[str, list[Tensor]] = {name: [] for name in self.quantizers}
        # Where a module quantizes its output, the codes of that quantizer are compared instead.
        self.layers = {
            name: modules[name]
            for name in layers
            if name in modules and not hasattr(modules[name], OUTPUT)
        }
        self.returned: dict[str, list[Tensor]] = {name: [] for name in self.layers}

    def __enter__(self) -> Recorder:
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
        if name not in self.quantizers:
            raise ValueError(
                f"Expected the model that the file was exported from, but it has no quantizer "
                f"{name!r}; quantize it with the same recipe."
            )
        return self.quantizers[name], self.given[name][int(call or 0)]

    def output(self, layer: str) -> Tensor | None:
        """Return what a layer returned, unless it was called several times."""
        returned = self.returned.get(layer, [])
        return returned[0] if len(returned) == 1 else None


class CutGraph:
    """An exported graph cut at the QuantizeLinear of every activation.

    Each becomes an input, fed from torch. What the graph computes for it, the codes it makes of
    what it is fed, and the output of every layer become outputs. Where a QuantizeLinear was moved
    up over pooling or a concatenation, the graph is cut at the place it was moved from.
    """

    def __init__(self, model: ir.Model) -> None:
        from lq.engines.onnxruntime_runner import OnnxRuntimeRunner
        from lq.export.passes import OUTPUT_OF, QUANTIZED_BY, WEIGHTED

        graph = model.graph
        self.graph_inputs = [str(value.name) for value in graph.inputs]
        self.figures: dict[str, LayerParity] = {}
        self.layers: dict[str, tuple[str, str]] = {}
        self.computed: dict[str, str] = {}
        self.codes: dict[str, str] = {}
        self.bounds: dict[str, tuple[float, float]] = {}
        self.max_shares: dict[str, float] = {}
        self.moved = {node.metadata_props.get(QUANTIZED_BY) for node in graph} - {None}
        for node in list(graph):
            name = str(node.name)
            module = node.metadata_props.get(OUTPUT_OF)
            if module is not None:
                layer = name if node.op_type in WEIGHTED else module
                self.layers[layer] = module, self._tap(graph, node.outputs[0])
                self.figures[layer] = LayerParity(layer)
            moved = node.metadata_props.get(QUANTIZED_BY)
            if moved is not None:
                self._cut_after(graph, moved, node.outputs[0])
            elif _is_cut(node) and _quantizer(name) not in self.moved:
                self._cut_before(graph, name, node)
        self.runner = OnnxRuntimeRunner.from_graph(model, optimize=False)
        self.min_sqnr_db = MIN_16_BIT_LAYER_SQNR_DB if self.runner.simulates else MIN_LAYER_SQNR_DB

    def _cut_before(self, graph: ir.Graph, name: str, quantize: ir.Node) -> None:
        """Feed a QuantizeLinear from torch, and see what it makes of it."""
        value, dequantize = quantize.inputs[0], next(node for node, _ in quantize.outputs[0].uses())
        assert value is not None
        if dequantize.op_type == "Clip":
            self.bounds[name] = _bounds(quantize, dequantize)
            dequantize = next(node for node, _ in dequantize.outputs[0].uses())
        quantize.replace_input_with(0, self._feed(graph, name, value))
        self.codes[name] = self._tap(graph, dequantize.outputs[0])
        if value.producer() is not None:
            self._compute(graph, name, value)

    def _cut_after(self, graph: ir.Graph, name: str, value: ir.Value) -> None:
        """Feed what reads a value whose quantizer stands further up."""
        value.replace_all_uses_with(self._feed(graph, name, value))
        self._compute(graph, name, value)

    def _compute(self, graph: ir.Graph, name: str, value: ir.Value) -> None:
        """See what the graph, cut further up already, computes for a quantizer."""
        self.computed[name] = self._tap(graph, value)
        is_16_bit = _is_behind_16_bit(value)
        self.max_shares[name] = MAX_16_BIT_CODE_SHARE if is_16_bit else MAX_CODE_SHARE

    def _feed(self, graph: ir.Graph, name: str, like: ir.Value) -> ir.Value:
        import onnx_ir as ir

        fed = ir.Value(name=f"{name}/fed", type=ir.TensorType(ir.DataType.FLOAT), shape=like.shape)
        graph.inputs.append(fed)
        self.figures[name] = LayerParity(name)
        return fed

    @staticmethod
    def _tap(graph: ir.Graph, value: ir.Value) -> str:
        if not value.is_graph_output():
            graph.outputs.append(value)
        return str(value.name)

    def compare(self, recorder: Recorder, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Feed one batch to all pieces and compare what they compute with torch."""
        given = {name: recorder.call(name) for name in {**self.codes, **self.computed}}
        feeds = {
            f"{name}/fed": _quantized(quantizer, x) if name in self.moved else x
            for name, (quantizer, x) in given.items()
        }
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
            if name in self.codes:
                self._note(
                    _code_parity(name, expected, _codes(quantizer, results[self.codes[name]]))
                )
            if name in self.computed:
                computed = _codes(quantizer, results[self.computed[name]])
                bounds = self.bounds.get(name, (-math.inf, math.inf))
                found = _code_parity(name, expected, computed.clamp(*bounds), _ties(quantizer, x))
                self._note(replace(found, max_share=self.max_shares[name]))

    def _note(self, found: LayerParity) -> None:
        self.figures[found.layer] = found.worse(self.figures[found.layer])


def _is_cut(node: ir.Node) -> bool:
    from lq.export.onnxruntime_encoding import REPEATS

    return node.op_type == "QuantizeLinear" and REPEATS not in node.metadata_props


def _is_behind_16_bit(value: ir.Value) -> bool:
    """Return whether a value is computed from what was rounded to 16 bits."""
    from lq.engines.cast_through import casts_to_16_bit

    queue, seen = [value], {value}
    while queue:
        node = queue.pop().producer()
        if node is None:
            continue
        if casts_to_16_bit(node):
            return True
        new = {x for x in node.inputs if x is not None} - seen
        queue += new
        seen |= new
    return False


def _bounds(quantize: ir.Node, clip: ir.Node) -> tuple[int, int]:
    """Return the codes that a QuantizeLinear is clipped to, counted from its zero-point."""
    from lq.export.passes import constant

    values = [constant(value) for value in (quantize.inputs[2], *clip.inputs[1:3])]
    zero, low, high = (int(value) for value in values if value is not None)
    return low - zero, high - zero


def _quantizer(node: str) -> str:
    """Return the quantizer call of a QuantizeLinear, which may stand on one of several inputs."""
    return node.partition("/in")[0]


def _encoded(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Return codes less the zero-point."""
    spec, zero = quantizer.spec, int(quantizer.zero_point)
    x, scale = x.detach().cpu().float(), quantizer.positive_scale.cpu()
    return encode(x, scale, spec.qmin - zero, spec.qmax - zero)


def _quantized(quantizer: Quantizer, x: Tensor) -> Tensor:
    return _encoded(quantizer, x) * quantizer.positive_scale.cpu()


def _codes(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Return codes as numbers that count: a float8 code by its place among all float8 numbers."""
    codes = _encoded(quantizer, x)
    if quantizer.spec.qmax != FP8_MAX:
        return codes
    bits = codes.to(torch.float8_e4m3fn).view(torch.int8).int()
    return torch.where(bits < 0, -(bits & 127), bits).float()


def _ties(quantizer: Quantizer, x: Tensor) -> Tensor:
    """Return where a value lies right between two codes, as averages of codes often do."""
    if not quantizer.spec.number_format.is_integer:
        return torch.zeros(x.shape, dtype=torch.bool)
    steps = x.detach().cpu().float() / quantizer.positive_scale.detach().cpu()
    return (steps.abs().frac() - 0.5).abs() <= TIE


def _code_parity(
    name: str, expected: Tensor, got: Tensor, ties: Tensor | None = None
) -> LayerParity:
    difference = (expected - got).abs()
    differs = difference > 0 if ties is None else (difference > 0) & ~ties
    return LayerParity(name, int(difference.max()), int(differs.sum()), difference.numel())
