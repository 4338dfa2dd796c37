"""Quantized layers: the float layer plus a quantizer on its input and one on its weight.

A quantized layer is the same object with its class changed to a subclass of its float class, so
``isinstance(layer, nn.Conv2d)`` holds and names, hooks and references stay valid.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from lq.attention import attend, merged_mask
from lq.functional import is_exporting, round_to_dtype
from lq.gemm import weight_of
from lq.quantizer import Quantizer
from lq.requantize import Way, requantizing
from lq.spec import LayerSpec


class Operands(NamedTuple):
    """What a quantized layer computes with.

    Attributes:
        input: The quantized input.
        weight: The quantized weight.
        bias: The bias.
        saved: A context in which operations save both as the quantizers want it.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    saved: AbstractContextManager[Any]


class Quantized(nn.Module):
    """What marks the classes that have quantizers: mixins before the float class."""


class QuantLayer(Quantized):
    """What all quantized layers share; a mixin before the float class.

    Attributes:
        input_quantizer: Quantizes the layer's input.
        weight_quantizer: Quantizes the layer's weight.
        layer_spec: What the recipe says of this layer.
    """

    input_quantizer: Quantizer
    weight_quantizer: Quantizer
    layer_spec: LayerSpec
    weight_axis = 0
    """Axis of the output channels in the weight."""

    def operands(self, input: Tensor) -> Operands:
        """Return what the layer computes with."""
        layer: Any = self  # a Conv or Linear, by the other base class
        stored, bias = layer.weight, layer.bias  # read once: a parametrized one is computed anew
        weight = self._in_compute_dtype(self.weight_quantizer(stored))
        bias = None if bias is None else self._in_compute_dtype(bias)
        quantized = self.input_quantizer(input)
        return Operands(quantized, weight, bias, self._saved(input, quantized, stored, weight))

    def _saved(
        self, input: Tensor, quantized: Tensor, stored: Tensor, weight: Tensor
    ) -> AbstractContextManager[Any]:
        """Return a context in which operations save operands as the quantizers want it."""
        inputs, weights = self.input_quantizer, self.weight_quantizer
        # A compiled program decides for itself what it saves and what it computes again.
        compiled = torch.compiler.is_compiling()
        if compiled or not (inputs.memory_efficient and torch.is_grad_enabled()):
            return nullcontext()
        again = weights.as_now()
        return requantizing(
            Way(quantized, input, inputs.as_now(), inputs.name),
            Way(weight, stored, lambda x: self._in_compute_dtype(again(x)), weights.name),
        )

    def _in_compute_dtype(self, x: Tensor) -> Tensor:
        dtype = self.input_quantizer.compute_dtype
        return x if dtype is None else round_to_dtype(x, dtype)

    def result(self, output: Any, input: Tensor) -> Any:
        """Return a 16-bit layer's output rounded to 16 bits, in the type of its input.

        What an own ``forward`` returns besides a tensor is not touched.
        """
        dtype = self.input_quantizer.compute_dtype
        if dtype is None or not isinstance(output, Tensor):
            return output
        return output.to(input.dtype) if is_exporting() else round_to_dtype(output, dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Classes made for subclasses have no importable name; pickle the float class instead.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (float_class(self),), *reduced[2:])


class _QuantConv(QuantLayer):
    def forward(self, input: Tensor) -> Any:
        quantized, weight, bias, saved = self.operands(input)
        with saved:
            output: Tensor = self._conv_forward(quantized, weight, bias)  # type: ignore[operator]
        return self.result(output, input)


class _QuantConvTranspose(QuantLayer):
    weight_axis = 1

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Any:
        quantized, weight, bias, saved = self.operands(input)
        with saved:
            output = self._transposed(quantized, weight, bias, output_size)
        return self.result(output, input)

    def _transposed(
        self, input: Tensor, weight: Tensor, bias: Tensor | None, output_size: list[int] | None
    ) -> Tensor:
        # Apart from `forward`, as compilers do not trace the padding inside two contexts.
        with _attributes(self, weight=weight, bias=bias):
            output: Tensor = super().forward(input, output_size)
        return output


class _QuantLinear(QuantLayer):
    def forward(self, input: Tensor) -> Any:
        quantized, weight, bias, saved = self.operands(input)
        with saved:
            output = F.linear(quantized, weight, bias)
        return self.result(output, input)


class QuantMultiheadAttention(QuantLayer, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with quantizers on the projection of query, key and value.

    One quantizer serves all three inputs. The output projection is a layer by itself; the products
    of attention run in float.
    """

    @property
    def weight(self) -> nn.Parameter:
        """The weight of the projections, ``[3 E, E]``."""
        return self.in_proj_weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The bias of the projections, ``[3 E]``."""
        return self.in_proj_bias

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the output and, if wanted, the attention's weights, as the float class does."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Expected `attn_mask` where `is_causal` is set, but got none.")
        batched = query.dim() == 3
        q, k, v = (self._heads(x, batched) for x in self._project(query, key, value))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask[None]
        mask = merged_mask(attn_mask, key_padding_mask, query, self.num_heads)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            output, weights = attend(q, k, v, mask, dropout)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights[0]
        else:
            output = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        output = output.transpose(1, 2).flatten(2)
        return self.out_proj(self._layout(output, batched)), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        quantized, weight, bias, _ = self.operands(query)
        if query is key and key is value:
            projected: Tensor = self.result(F.linear(quantized, weight, bias), query)
            return projected.chunk(3, -1)
        inputs = quantized, self.input_quantizer(key), self.input_quantizer(value)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        parts = zip(inputs, weight.chunk(3), biases, strict=True)
        return tuple(self.result(F.linear(x, w, b), query) for x, w, b in parts)

    def _layout(self, x: Tensor, batched: bool) -> Tensor:
        """Return ``[N, L, E]`` in the module's own layout, or from it."""
        if not batched:
            return x[0] if x.dim() == 3 else x[None]
        return x if self.batch_first else x.transpose(0, 1)

    def _heads(self, x: Tensor, batched: bool) -> Tensor:
        """Return ``[N, heads, L, D]``."""
        x = self._layout(x, batched)
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class QuantConv1d(_QuantConv, nn.Conv1d):
    """``nn.Conv1d`` with quantizers."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """``nn.Conv2d`` with quantizers."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """``nn.Conv3d`` with quantizers."""


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """``nn.ConvTranspose1d`` with quantizers."""


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """``nn.ConvTranspose2d`` with quantizers."""


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """``nn.ConvTranspose3d`` with quantizers."""


class QuantLinear(_QuantLinear, nn.Linear):
    """``nn.Linear`` with quantizers."""


QUANT_CLASSES: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Linear: QuantLinear,
    nn.MultiheadAttention: QuantMultiheadAttention,
}
"""Float layer class -> quantized class. A new kind of layer is a class and a row here."""


def _family(cls: type) -> type[nn.Module] | None:
    return next((base for base in QUANT_CLASSES if issubclass(cls, base)), None)


def float_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module without quantizers and parametrizations."""
    classes: tuple[type[nn.Module], ...] = type_before_parametrizations(module).__mro__
    return next(c for c in classes if not issubclass(c, Quantized))


@functools.cache
def quantized_class(cls: type[nn.Module]) -> type[QuantLayer]:
    """Return the quantized subclass of a supported float class or of a subclass of one.

    Example:
        >>> quantized_class(nn.Linear).__name__
        'QuantLinear'
    """
    if cls in QUANT_CLASSES:
        return QUANT_CLASSES[cls]
    family = _family(cls)
    if family is None:
        raise ValueError(
            f"Expected a Conv, ConvTranspose, Linear or attention class, but got {cls.__name__}."
        )
    quantized = QUANT_CLASSES[family]
    namespace: dict[str, Any] = {"__doc__": cls.__doc__, "weight_axis": quantized.weight_axis}
    if _inherits_forward(cls):
        return type(f"Quant{cls.__name__}", (quantized.__bases__[0], cls), namespace)
    namespace["forward"] = _on_quantized_operands(cls)
    return type(f"Quant{cls.__name__}", (QuantLayer, cls), namespace)


def output_axis(layer: nn.Module) -> int:
    """Return the axis of the output channels in the weight of a layer that can be quantized.

    Example:
        >>> output_axis(nn.Conv2d(3, 8, 1)), output_axis(nn.ConvTranspose2d(3, 8, 1))
        (0, 1)
    """
    return quantized_class(float_class(layer)).weight_axis  # type: ignore[arg-type]


def _on_quantized_operands(cls: type[nn.Module]) -> Callable[..., Any]:
    """Return a class's own ``forward``, run on the quantized input and weight."""
    first = [*inspect.signature(cls.forward).parameters, "input"][1]

    @functools.wraps(cls.forward)
    def forward(self: QuantLayer, *args: Any, **kwargs: Any) -> Any:
        input = args[0] if args else kwargs.pop(first)
        quantized, weight, bias, saved = self.operands(input)
        with saved, _attributes(self, weight=weight, bias=bias):
            output = cls.forward(self, quantized, *args[1:], **kwargs)
        return self.result(output, input)

    return forward


def _shadows_weight(cls: type[nn.Module]) -> bool:
    """Return whether a class's forward is run with the quantized weight in the weight's place."""
    return issubclass(cls, _ConvTransposeNd) or not _inherits_forward(cls)


def _inherits_forward(cls: type[nn.Module]) -> bool:
    family = _family(cls)
    return family is not None and cls.forward is family.forward


def _new(cls: type[nn.Module]) -> QuantLayer:
    quantized: type[QuantLayer] = quantized_class(cls)  # type: ignore[arg-type]
    return quantized.__new__(quantized)


def unsupported(layer: nn.Module) -> str | None:
    """Return why a Conv or Linear layer cannot be quantized, or ``None`` where it can."""
    if isinstance(layer, nn.MultiheadAttention):
        return _unsupported_attention(layer)
    if isinstance(layer, nn.modules.lazy.LazyModuleMixin):
        return "lazy layers have no weight yet; run one forward pass first"
    if len(inspect.signature(layer.forward).parameters) == 0:
        return "its forward takes no input"
    weight = weight_of(layer)
    if weight is None:
        return "it has no weight tensor"
    if is_parametrized(layer) and _shadows_weight(float_class(layer)):
        return "its forward reads a parametrized weight"
    if not weight.is_floating_point() or type(weight) not in (Tensor, nn.Parameter):
        return "its weight is not a plain float tensor"
    return None


def _unsupported_attention(layer: nn.MultiheadAttention) -> str | None:
    if not _inherits_forward(float_class(layer)):
        return "its forward is not that of nn.MultiheadAttention"
    if layer.in_proj_weight is None:
        return "its key or value has another size than its query"
    if layer.bias_k is not None or layer.add_zero_attn:
        return "it adds a key and a value of its own"
    return None


def is_quantizable(layer: nn.Module) -> bool:
    """Return whether a layer is of a kind that is quantized, or is already."""
    return _family(type(layer)) is not None


def attach_quantizers(layer: nn.Module, spec: LayerSpec, name: str) -> None:
    """Turn a float layer into its quantized class, in place.

    Raises:
        TypeError: Where Python cannot change the object's class.
    """
    cls: type[QuantLayer] = quantized_class(float_class(layer))  # type: ignore[arg-type]
    weight = weight_of(layer)
    assert weight is not None
    weights = spec.weights
    channels = None
    if weights.axis is not None:
        weights = dataclasses.replace(weights, axis=cls.weight_axis)
        channels = weight.shape[cls.weight_axis] if weights.needs_scale else None
    change_class(layer, cls)
    quantized: Any = layer
    device = weight.device
    quantized.layer_spec = spec
    quantized.input_quantizer = Quantizer(spec.inputs, None, f"{name}input_quantizer", device)
    quantized.weight_quantizer = Quantizer(weights, channels, f"{name}weight_quantizer", device)


def detach_quantizers(layer: nn.Module) -> None:
    """Turn a quantized layer into the float layer it was, in place."""
    cls = float_class(layer)
    quantized: Any = layer
    del quantized.input_quantizer, quantized.weight_quantizer, quantized.layer_spec
    change_class(layer, cls)


def change_class(layer: nn.Module, cls: type[nn.Module]) -> None:
    """Change a layer's class, under the one that torch puts on top of parametrized layers."""
    if is_parametrized(layer):
        top = type(layer)
        namespace = {k: v for k, v in vars(top).items() if k not in ("__dict__", "__weakref__")}
        cls = type(top.__name__, (cls,), namespace)
    layer.__class__ = cls


@contextmanager
def _attributes(module: nn.Module, **values: Any) -> Iterator[None]:
    """Let attributes shadow parameters of the same name for a while.

    An instance attribute is found before ``nn.Module`` looks among its parameters. Pruning and
    weight norm keep such attributes of their own, which are put back.
    """
    attributes = module.__dict__
    before = {name: attributes[name] for name in values if name in attributes}
    for name, value in values.items():
        attributes[name] = value
    try:
        yield
    finally:
        for name in values:
            del attributes[name]
        attributes.update(before)
