"""What each layer of a model costs in each format: bytes, bit operations, and measured time."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from lq.batches import model_inputs, tensors
from lq.formats import FORMATS, layer_formats
from lq.gemm import weight_of
from lq.layers import output_axis
from lq.modes import eval_mode, quantizer_mode
from lq.quantizer import Mode
from lq.samples import count_samples
from lq.surgery import quantizable_layers, quantizers

QUANTITIES = ("size_mb", "bitops", "latency_ms")
SCALE_BYTES = 4


@dataclass(frozen=True)
class LayerCost:
    """What is counted of one layer, whatever its format.

    Attributes:
        weights: Numbers in its weight; 0 where another layer's is used again.
        channels: Scales that a quantized weight has.
        biases: Numbers in its bias.
        macs: Multiply-accumulates for one sample.
        tied: The layer whose weight it uses again; empty where it has its own.
    """

    weights: int
    channels: int
    biases: int
    macs: int
    tied: str = ""

    def size_mb(self, format: str) -> float:
        """Return the size of weight, scales and bias, in 10^6 bytes."""
        weights = FORMATS[layer_formats(format)[0]]
        scales = (self.channels + 1) * SCALE_BYTES if weights.needs_scale and self.weights else 0
        bias = self.biases * (2 if weights.bits == 16 else 4)
        return (self.weights * weights.bits / 8 + scales + bias) / 1e6

    def bitops(self, format: str) -> float:
        """Return ``macs * bits(weights) * bits(inputs)``, of one sample."""
        weights, inputs = layer_formats(format)
        return float(self.macs * FORMATS[weights].bits * FORMATS[inputs].bits)


@dataclass(frozen=True)
class Costs:
    """What the layers of a model cost.

    Attributes:
        layers: Layer -> what was counted of it.
        rest_mb: Size of the parameters that are no layer's, in float32, such as BatchNorm's.
        latency: Layer -> format -> measured milliseconds for one sample; empty if not measured.
        rest_ms: Measured milliseconds of all that is no layer.
        engine: What measured the time: ``onnxruntime`` or ``tensorrt``; empty if not measured.
        hardware: What the time was measured on.
    """

    layers: Mapping[str, LayerCost]
    rest_mb: float
    latency: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    rest_ms: float = 0.0
    engine: str = ""
    hardware: str = ""

    def of(self, quantity: str, layer: str, format: str) -> float:
        """Return the ``size_mb``, ``bitops`` or ``latency_ms`` of one layer in one format.

        Raises:
            ValueError: If the latency was not measured.
        """
        if quantity == "size_mb":
            return self.layers[layer].size_mb(format)
        if quantity == "bitops":
            return self.layers[layer].bitops(format)
        found = self.latency.get(layer, {})
        if format not in found:
            where = f" on {self.hardware}" if self.hardware else ""
            raise ValueError(
                f"Expected a measured latency of layer {layer!r} in {format}{where}, but there is "
                "none; measure it with lq.measure_latency, or allow other `formats`."
            )
        return found[format]

    def runs(self, format: str) -> bool:
        """Return whether the engine that was timed runs a format, or none was timed."""
        return all(format in times for times in self.latency.values())

    def rest(self, quantity: str) -> float:
        """Return what the model costs besides its layers."""
        return {"size_mb": self.rest_mb, "bitops": 0.0, "latency_ms": self.rest_ms}[quantity]

    def total(self, quantity: str, plan: Mapping[str, str]) -> float:
        """Return what the model costs under a plan; layers that it does not name are float.

        Example:
            >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU())
            >>> costs = count_costs(model, torch.zeros(2, 3, 6, 6))
            >>> costs.layers["0"].macs, costs.total("bitops", {"0": "int8"})
            (3456, 221184.0)
            >>> [round(costs.total("size_mb", {"0": format}) * 1e6) for format in ("fp32", "int8")]
            [864, 252]
        """
        formats = {name: plan.get(name, "fp32") for name in self.layers}
        parts = sum(self.of(quantity, name, format) for name, format in formats.items())
        again = self._stored_again(formats) if quantity == "size_mb" else 0.0
        return self.rest(quantity) + parts + again

    def _stored_again(self, formats: Mapping[str, str]) -> float:
        """Return the size of weights that another layer uses in another format than their own."""
        pairs = {
            (counted.tied, formats[name]): dataclasses.replace(self.layers[counted.tied], biases=0)
            for name, counted in self.layers.items()
            if counted.tied and formats[name] != formats[counted.tied]
        }
        return sum(owner.size_mb(format) for (_, format), owner in pairs.items())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; ``from_dict`` gives it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Costs:
        """Return the costs that ``to_dict`` wrote."""
        layers = {name: LayerCost(**counted) for name, counted in values["layers"].items()}
        return cls(**{**values, "layers": layers})


def count_costs(model: nn.Module, batch: Any) -> Costs:
    """Count parameters and multiply-accumulates of a model's layers, from the shapes they see.

    Args:
        model: A float or quantized model, which runs once, in float.
        batch: One batch; counts are for one sample of it.
    """
    layers, _ = quantizable_layers(model)
    macs: dict[str, int] = defaultdict(int)
    with _hooks(layers, macs), _in_float(model):
        args, kwargs = model_inputs(model, batch)
        model(*args, **kwargs)
    samples, counted = count_samples(batch), dict[int, str]()
    found = {name: _counted(name, m, macs[name] // samples, counted) for name, m in layers.items()}
    scales = {id(quantizer.scale) for quantizer in quantizers(model).values()}
    held = {id(t): t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()}
    rest = sum(t.numel() for key, t in held.items() if key not in {*counted} | scales)
    return Costs(found, 4 * rest / 1e6)


def _counted(name: str, layer: nn.Module, macs: int, counted: dict[int, str]) -> LayerCost:
    weight, bias = weight_of(layer), _bias_of(layer)
    assert weight is not None
    tied = counted.get(id(weight), "")
    fresh = [x for x in (weight, bias) if x is not None and id(x) not in counted]
    counted |= {id(x): name for x in fresh}
    numbers = {id(x): x.numel() for x in fresh}
    channels = weight.shape[output_axis(layer)]
    return LayerCost(numbers.get(id(weight), 0), channels, numbers.get(id(bias), 0), macs, tied)


def _bias_of(layer: nn.Module) -> Tensor | None:
    name = "in_proj_bias" if isinstance(layer, nn.MultiheadAttention) else "bias"
    bias: Tensor | None = getattr(layer, name, None)
    return bias


@contextmanager
def _hooks(layers: Mapping[str, nn.Module], macs: dict[str, int]) -> Iterator[None]:
    handles = [
        layer.register_forward_hook(_counter(name, macs), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _counter(name: str, macs: dict[str, int]) -> Callable[..., None]:
    def count(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = tensors([*args, *kwargs.values()])
        macs[name] += layer_macs(layer, given, tensors(output)[0])
        if isinstance(layer, nn.MultiheadAttention):  # which may not call its output projection
            macs[f"{name}.out_proj"] = macs[name] // 3

    return count


def layer_macs(layer: nn.Module, given: list[Tensor], output: Tensor) -> int:
    """Return the multiply-accumulates of one call: places times the numbers of the weight.

    A convolution uses its weight once for every output place, a transposed one for every input
    place, a Linear for every row; an attention its own, without its output projection's.

    Args:
        layer: A layer with a weight.
        given: The tensors it was given.
        output: What it returned.

    Example:
        >>> layer_macs(nn.Linear(4, 8), [torch.zeros(2, 4)], torch.zeros(2, 8))
        64
    """
    weight = weight_of(layer)
    assert weight is not None
    if isinstance(layer, nn.MultiheadAttention):
        rows = sum(x.numel() // x.shape[-1] for x in given[:3])
        return rows * weight.numel() // 3
    if isinstance(layer, nn.Linear):
        return output.numel() // output.shape[-1] * weight.numel()
    if isinstance(layer, _ConvTransposeNd):
        return given[0].numel() // weight.shape[0] * weight.numel()
    return output.numel() // weight.shape[output_axis(layer)] * weight.numel()


@contextmanager
def _in_float(model: nn.Module) -> Iterator[None]:
    """Run in float for a while, without the operator that skips the layers of a transformer's."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with quantizer_mode(model, Mode.BYPASS), eval_mode(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
