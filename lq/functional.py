"""Fake quantization and its measures, as pure tensor functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FP8_MAX = 448.0
"""Largest finite value of float8 E4M3."""
_LEAST_SCALE = 1e-12
"""What a scale that learned its way to zero or below is used as."""


def amax_to_scale(amax: Tensor, qmax: float) -> Tensor:
    """Return the scale that maps a magnitude to the largest code.

    ``scale = amax / qmax``

    A tensor that is zero everywhere has no range of its own and gets the range [-1, 1]; a
    denormal one gets the smallest normal scale, so that every scale is positive and its
    reciprocal finite (TensorRT refuses any other).

    Args:
        amax: Largest magnitudes, of any shape, not negative.
        qmax: Largest code, 127 for int8.

    Example:
        >>> amax_to_scale(torch.tensor([12.7, 0.0]), 127)
        tensor([0.1000, 0.0079])
    """
    amax = torch.where(amax == 0, torch.ones_like(amax), amax)
    return (amax.float() / qmax).clamp_min(torch.finfo(torch.float32).tiny)


def along_axis(scale: Tensor, axis: int | None, ndim: int) -> Tensor:
    """Return a view of a per-channel scale ``[C]`` that broadcasts along `axis` of `ndim` axes."""
    if axis is None:
        return scale
    return scale.view([-1 if i == axis % ndim else 1 for i in range(ndim)])


def other_axes(axis: int | None, ndim: int) -> list[int]:
    """Return the axes of `ndim` that share a scale: all but one, or all for ``None``."""
    return [i for i in range(ndim) if axis is None or i != axis % ndim]


def amax_along_axis(x: Tensor, axis: int | None) -> Tensor:
    """Return the largest magnitudes ``[C]`` along an axis, or ``[]`` of all for ``None``.

    Example:
        >>> amax_along_axis(torch.tensor([[1.0, -3.0], [2.0, 0.5]]), axis=0)
        tensor([3., 2.])
    """
    return x.abs().amax(other_axes(axis, x.dim()))


def in_memory_order(x: Tensor) -> Tensor:
    """Return the elements ``[N]`` in the order they lie in memory, without a copy where dense."""
    order = sorted(range(x.dim()), key=lambda i: x.stride(i), reverse=True)
    return x.permute(order).reshape(-1)


def encode(
    x: Tensor,
    scale: Tensor,
    qmin: float,
    qmax: float,
    axis: int | None = None,
    zero_point: Tensor | None = None,
) -> Tensor:
    """Return the codes of a tensor, as floats.

    ``code = clamp(round_half_even(x / scale) + zero_point, qmin, qmax)``

    For float8 E4M3 (``qmax = 448``) rounding is to the nearest float8 number instead.

    Args:
        x: Tensor of any shape.
        scale: ``[]`` per tensor or ``[C]`` per channel, positive.
        qmin: Smallest code.
        qmax: Largest code.
        axis: Channel axis of `x`; ``None`` per tensor.
        zero_point: Code of 0, a whole number ``[]``; 0 if not given.

    Example:
        >>> encode(torch.tensor([-9.0, -0.25, 0.3]), torch.tensor(0.1), -128, 127)
        tensor([-90.,  -2.,   3.])
    """
    codes = torch.div(x, along_axis(scale, axis, x.dim()))
    if qmax == FP8_MAX:
        return codes.clamp_(qmin, qmax).to(torch.float8_e4m3fn).to(x.dtype)
    codes.round_()
    return (codes if zero_point is None else codes.add_(zero_point)).clamp_(qmin, qmax)


class _FakeQuantize(torch.autograd.Function):
    """Quantize and dequantize in place: on CPU faster than the native operator."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        qmin: float,
        qmax: float,
        axis: int | None,
        offset: Tensor | None,
        clipped_only: bool,
        requantize: bool,
    ) -> Tensor:
        zero_point = None if offset is None else offset_to_zero_point(offset, scale, qmin, qmax)
        y = _round_trip(x, scale, qmin, qmax, axis, zero_point)
        keep_output = ctx.needs_input_grad[1] and not requantize
        ctx.save_for_backward(x, scale, zero_point, y if keep_output else None)
        ctx.qmin, ctx.qmax, ctx.axis, ctx.clipped_only = qmin, qmax, axis, clipped_only
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, scale, zero_point, y = ctx.saved_tensors
        where = _codes_in_range(x, scale, ctx.qmin, ctx.qmax, ctx.axis, zero_point)
        grad_scale = grad_offset = None
        if ctx.needs_input_grad[1]:  # first, so that its temporary tensor is free again
            if y is None:
                y = _round_trip(x, scale, ctx.qmin, ctx.qmax, ctx.axis, zero_point)
            inside = _inside(y if ctx.clipped_only else x, *where)
            grad_scale = _scale_gradient(grad, inside, y, scale, ctx.axis)
            del inside
        passed = _inside(grad, *where)
        if zero_point is not None:
            grad_offset = (grad - passed).sum()
            grad_scale = None if grad_scale is None else grad_scale + zero_point * grad_offset
        return passed, grad_scale, None, None, None, grad_offset, None, None


def _round_trip(
    x: Tensor,
    scale: Tensor,
    qmin: float,
    qmax: float,
    axis: int | None,
    zero_point: Tensor | None,
) -> Tensor:
    """Return what the codes of a tensor stand for."""
    y = encode(x, scale, qmin, qmax, axis, zero_point)
    if zero_point is not None:
        y.sub_(zero_point)
    return y.mul_(along_axis(scale, axis, x.dim()))


def _bounds(qmin: float, qmax: float) -> tuple[float, float]:
    """Return the open interval of ``x / scale`` that is rounded to a code in ``[qmin, qmax]``."""
    if qmax == FP8_MAX:
        return qmin - 16.0, qmax + 16.0  # half way to where the next number would be
    low, high = qmin - 0.5, qmax + 0.5
    # A tie goes to the even code, which is in range where qmin or qmax is even.
    inclusive = 2**-22
    low -= abs(low) * inclusive if qmin % 2 == 0 else 0
    high += abs(high) * inclusive if qmax % 2 == 0 else 0
    return low, high


def _codes_in_range(
    x: Tensor,
    scale: Tensor,
    qmin: float,
    qmax: float,
    axis: int | None,
    zero_point: Tensor | None,
) -> tuple[Tensor, float, float]:
    """Return a tensor and the open interval that it is in where the code of `x` is not clamped."""
    # Bounds are numbers, so where scale and zero-point are not ones that can be read without
    # waiting, x is moved to them.
    if axis is None and x.device.type == "cpu" and not torch.compiler.is_compiling():
        zero = 0.0 if zero_point is None else zero_point.item()
        low, high = (bound * scale.item() for bound in _bounds(qmin - zero, qmax - zero))
        return x, low, high
    codes = x / along_axis(scale, axis, x.dim())
    # Rounded first: which way a tie goes is decided before the zero-point is added.
    codes = codes if zero_point is None else codes.round() + zero_point
    return codes, *_bounds(qmin, qmax)


def _inside(values: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Return `values` where ``low < x < high`` and 0 elsewhere: one pass, no mask in memory."""
    kept: Tensor = torch.ops.aten.hardtanh_backward(values, x, low, high)
    return kept


def _scale_gradient(
    grad: Tensor, inside: Tensor, y: Tensor, scale: Tensor, axis: int | None
) -> Tensor:
    """Return the gradient of a learned scale, but for what a zero-point adds to it.

    ``sum(grad * (code - x / scale))`` over what is inside the range plus ``sum(grad * code)`` over
    what is clipped (LSQ, Esser et al. 2020, equation 3); the second sum alone where `inside` is `y`
    (PACT, Choi et al. 2018, equation 2). With a zero-point a clipped value is
    ``code * scale + offset``, of which the code is counted (LSQ+, Bhalgat et al. 2020, equation 5);
    here it is counted less the zero-point.

    Args:
        grad: Gradient of the quantized tensor.
        inside: What was quantized where inside the range, 0 elsewhere; is overwritten.
        y: What it became, ``(code - zero_point) * scale``.
        scale: ``[]`` or ``[C]``.
        axis: Channel axis; ``None`` per tensor.
    """
    # The difference first: it is small, and two sums of large products would cancel.
    return _dot(grad, inside.sub_(y), axis) / -scale


def _dot(a: Tensor, b: Tensor, axis: int | None) -> Tensor:
    """Return the sum of products, over all axes or all but one."""
    if axis is None and a.stride() == b.stride():
        return torch.dot(in_memory_order(a), in_memory_order(b))
    return (a * b).sum(other_axes(axis, a.dim()))


def offset_to_zero_point(offset: Tensor, scale: Tensor, qmin: float, qmax: float) -> Tensor:
    """Return the code of 0 for a range that begins at an offset, a whole number as a float.

    ``zero_point = clamp(round_half_even(qmin - offset / scale), qmin, qmax)``

    Args:
        offset: Value of the smallest code, ``[]``.
        scale: ``[]``, positive.
        qmin: Smallest code.
        qmax: Largest code.

    Example:
        >>> offset_to_zero_point(torch.tensor(-0.3), torch.tensor(0.1), 0, 255)
        tensor(3.)
    """
    return (qmin - offset / scale).round().clamp(qmin, qmax)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    qmin: float,
    qmax: float,
    axis: int | None = None,
    offset: Tensor | None = None,
    clipped_only: bool = False,
    requantize: bool = False,
) -> Tensor:
    """Round a tensor to the numbers an integer engine can hold, and keep it differentiable.

    ``y = (clamp(round_half_even(x / scale) + z, qmin, qmax) - z) * scale``

    The zero-point ``z`` is 0, or ``round_half_even(qmin - offset / scale)``. The gradient with
    respect to `x` passes where the code is not clamped and is zero elsewhere (straight-through,
    Bengio et al. 2013); a scale that requires a gradient gets LSQ's (Esser et al. 2020), and an
    offset LSQ+'s (Bhalgat et al. 2020). Half-precision inputs, also under autocast, are computed
    in float32 and returned in their own type.

    Args:
        x: Tensor of any shape, floating point.
        scale: ``[]`` per tensor or ``[C]`` per channel, float32, positive.
        qmin: Smallest code: -128 (inputs), -127 (weights), 0 (unsigned).
        qmax: Largest code; 448 rounds to float8 E4M3.
        axis: Channel axis of `x`; ``None`` per tensor.
        offset: Value of the smallest code, ``[]``; ``None`` for zero-point 0.
        clipped_only: Give the scale the gradient of what is clipped alone (PACT, Choi et al. 2018).
        requantize: Compute the result once more for the gradient of the scale, rather than save it.

    Example:
        >>> fake_quantize(torch.tensor([-0.26, 0.04, 99.0]), torch.tensor(0.1), -128, 127)
        tensor([-0.3000,  0.0000, 12.7000])
    """
    values = x.float()
    if offset is None and _native_is_faster(values, scale, qmax):
        y = _native(values, scale, int(qmin), int(qmax), axis)
    else:
        y = _FakeQuantize.apply(values, scale, qmin, qmax, axis, offset, clipped_only, requantize)
    return y.to(x.dtype)


class _LearnedScale(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scale: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return scale.clamp_min(_LEAST_SCALE)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.factor, None


def learned_scale(scale: Tensor, factor: float = 1.0) -> Tensor:
    """Return a scale that trains: kept above zero, its gradient multiplied by a factor.

    The gradient passes also where the scale stepped below zero, so that it can come back.

    Args:
        scale: ``[]`` or ``[C]``.
        factor: What the gradient is multiplied by.

    Example:
        >>> scale = torch.tensor(0.5, requires_grad=True)
        >>> learned_scale(scale, 0.1).square().backward()
        >>> scale.grad
        tensor(0.1000)
    """
    if not scale.requires_grad or is_exporting():
        return scale.detach().clamp_min(_LEAST_SCALE)
    positive: Tensor = _LearnedScale.apply(scale, factor)
    return positive


def _native_is_faster(x: Tensor, scale: Tensor, qmax: float) -> bool:
    """On CUDA torch's operator is one fused kernel; it knows neither float8 nor our LSQ."""
    return x.is_cuda and qmax != FP8_MAX and not scale.requires_grad


def _native(x: Tensor, scale: Tensor, qmin: int, qmax: int, axis: int | None) -> Tensor:
    zero_point = torch.zeros_like(scale, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)
    return torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, qmin, qmax)


# While a model is exported this operator stands for `fake_quantize`: exporters decompose or refuse
# torch's own for all but one range, and this one keeps scale and axis until the graph is written.
_fake_quantize_op = torch.library.custom_op(
    "lq::fake_quantize",
    fake_quantize,
    mutates_args=(),
    schema="(Tensor x, Tensor scale, float qmin, float qmax, int? axis, Tensor? offset) -> Tensor",
)


@_fake_quantize_op.register_fake
def _(
    x: Tensor, scale: Tensor, qmin: float, qmax: float, axis: int | None, offset: Tensor | None
) -> Tensor:
    return torch.empty_like(x)


def is_exporting() -> bool:
    """Return whether a model is being traced for export."""
    return torch.compiler.is_exporting()


def is_in_backward() -> bool:
    """Return whether a backward pass is running, which may repeat a part of the forward pass."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def round_to_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to the numbers a float type holds, staying in the type of `x`.

    Engines multiply fp16 and bf16 with float32 accumulators, and so does float32 arithmetic on
    rounded operands. While exporting this is the cast itself.

    Example:
        >>> round_to_dtype(torch.tensor([1.0, 1.0001, 2049.0]), torch.float16)
        tensor([1.0000e+00, 1.0000e+00, 2.0480e+03])
    """
    rounded = x.to(dtype)
    return rounded if is_exporting() else rounded.to(x.dtype)


def sqnr_db(reference: Tensor, approximation: Tensor) -> float:
    """Return the signal-to-quantization-noise ratio in decibels.

    ``SQNR = 10 log10(sum(reference^2) / sum((reference - approximation)^2))``

    Equal tensors give ``inf``.

    Args:
        reference: Float tensor of any shape.
        approximation: Tensor of the same shape.

    Example:
        >>> round(sqnr_db(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])), 2)
        20.0
    """
    reference, approximation = reference.detach().double(), approximation.detach()
    signal = reference.square().sum()
    noise = (reference - approximation.double()).square().sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(signal / noise))
