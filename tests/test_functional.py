from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lq.functional import (
    FP8_MAX,
    along_axis,
    amax_to_scale,
    encode,
    fake_quantize,
    round_to_dtype,
    sqnr_db,
)


class Range(NamedTuple):
    qmin: int
    qmax: int


def integer_range(bits: int, kind: str) -> Range:
    """The range of a b-bit integer, written down without lq."""
    return {
        "signed": Range(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1),
        "narrow": Range(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1),
        "unsigned": Range(0, 2**bits - 1),
    }[kind]


RANGES = [
    pytest.param(integer_range(bits, kind), id=f"{kind}-int{bits}")
    for bits in range(2, 9)
    for kind in ("signed", "narrow", "unsigned")
]
SOME_RANGES = [
    pytest.param(integer_range(bits, kind), id=f"{kind}-int{bits}")
    for bits, kind in [(8, "signed"), (8, "narrow"), (8, "unsigned"), (4, "signed"), (2, "signed")]
]
AXES = [pytest.param(axis, id=f"axis={axis}") for axis in (None, 0, 1, -1)]
SHAPE = (4, 6, 5, 3)


def sample(qmax: float, axis: int | None, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Values of which a good share lies beyond the range, and a scale that is no power of two."""
    generator = torch.Generator().manual_seed(seed)
    channels = [] if axis is None else [SHAPE[axis]]
    scale = torch.rand(channels, generator=generator) * 0.09 + 0.01
    x = torch.randn(SHAPE, generator=generator) * qmax * 0.7
    return x * along_axis(scale, axis, 4), scale


def numpy_codes(x: Tensor, scale: Tensor, limits: Range, axis: int | None) -> np.ndarray:
    step = scale.numpy()
    if axis is not None:
        step = np.expand_dims(step, tuple(i for i in range(x.dim()) if i != axis % x.dim()))
    return np.clip(np.rint(x.numpy() / step), limits.qmin, limits.qmax)


def torch_fake_quantize(x: Tensor, scale: Tensor, limits: Range, axis: int | None) -> Tensor:
    zero = torch.zeros_like(scale, dtype=torch.int32)
    if axis is None:
        return torch.fake_quantize_per_tensor_affine(x, scale, zero, *limits)
    return torch.fake_quantize_per_channel_affine(x, scale, zero, axis % x.dim(), *limits)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("limits", RANGES)
def test_codes_and_values_are_numpys(limits: Range, axis: int | None) -> None:
    x, scale = sample(limits.qmax, axis)

    codes = encode(x, scale, *limits, axis)
    expected = numpy_codes(x, scale, limits, axis)

    assert (expected == limits.qmax).any(), "the sample must reach beyond the range"
    np.testing.assert_array_equal(codes.numpy(), expected)
    step = along_axis(scale, axis, 4).numpy()
    np.testing.assert_array_equal(
        fake_quantize(x, scale, *limits, axis).numpy(), expected.astype(np.float32) * step
    )


@pytest.mark.parametrize("limits", SOME_RANGES)
def test_ties_round_to_even(limits: Range) -> None:
    halves = torch.arange(2 * limits.qmin - 3, 2 * limits.qmax + 4) / 2
    scale = torch.tensor(0.25)

    codes = encode(halves * 0.25, scale, *limits)

    expected = [min(max(round(h), limits.qmin), limits.qmax) for h in halves.tolist()]
    assert codes.tolist() == expected


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("limits", SOME_RANGES)
def test_values_are_torchs_within_one_code_at_ties(limits: Range, axis: int | None) -> None:
    x, scale = sample(limits.qmax, axis, seed=1)
    step = along_axis(scale, axis, 4)

    y, reference = (
        fake_quantize(x, scale, *limits, axis),
        torch_fake_quantize(x, scale, limits, axis),
    )

    codes, reference_codes = (y / step).round(), (reference / step).round()
    # torch multiplies by the reciprocal, so only a tie can round the other way.
    tie = ((x / step).abs().frac() - 0.5).abs() < 1e-4
    assert torch.equal(codes[~tie], reference_codes[~tie])
    assert (codes - reference_codes).abs().max() <= 1


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("limits", SOME_RANGES)
def test_gradient_is_torchs(limits: Range, axis: int | None) -> None:
    x, scale = sample(limits.qmax, axis, seed=2)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    weights = torch.randn_like(x)

    (fake_quantize(ours, scale, *limits, axis) * weights).sum().backward()
    (torch_fake_quantize(theirs, scale, limits, axis) * weights).sum().backward()

    assert ours.grad is not None
    assert theirs.grad is not None
    assert (theirs.grad == 0).any()
    assert (theirs.grad != 0).any()
    assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("limits", SOME_RANGES)
def test_gradient_passes_where_the_rounded_value_is_in_range(limits: Range) -> None:
    # The range's edge is half a step beyond the last code: amax itself and what rounds to it pass.
    beyond = torch.tensor([limits.qmin - 0.6, limits.qmin - 0.4, limits.qmin])
    x = torch.cat([beyond, torch.tensor([limits.qmax, limits.qmax + 0.4, limits.qmax + 0.6])])
    scale = torch.tensor(0.5)
    x = (x * scale).requires_grad_()

    fake_quantize(x, scale, *limits).sum().backward()

    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


@pytest.mark.parametrize("axis", [None, 0], ids=["per-tensor", "per-channel"])
@pytest.mark.parametrize("limits", SOME_RANGES)
def test_gradient_at_ties_is_torchs(limits: Range, axis: int | None) -> None:
    # qmin <= round(x / scale) <= qmax: -128.5 rounds to -128, which is in range.
    x = torch.tensor([[limits.qmin - 0.5, limits.qmax + 0.5]]) * 0.5
    scale = torch.tensor(0.5) if axis is None else torch.tensor([0.5])
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    fake_quantize(ours, scale, *limits, axis).sum().backward()
    torch_fake_quantize(theirs, scale, limits, axis).sum().backward()

    assert ours.grad is not None
    assert theirs.grad is not None
    assert ours.grad.tolist() == theirs.grad.tolist()


@pytest.mark.parametrize("axis", [None, 0, 1], ids=lambda axis: f"axis={axis}")
@pytest.mark.parametrize("limits", SOME_RANGES)
def test_scale_gradient_is_torchs_learnable_op(limits: Range, axis: int | None) -> None:
    x, scale = sample(limits.qmax, axis, seed=3)
    weights = torch.randn_like(x)
    ours = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    theirs = [x.clone().requires_grad_(), scale.clone().reshape(-1).requires_grad_()]
    zero = torch.zeros_like(theirs[1])

    (fake_quantize(*ours, *limits, axis) * weights).sum().backward()
    if axis is None:
        y = torch._fake_quantize_learnable_per_tensor_affine(*theirs, zero, *limits, 1.0)
    else:
        y = torch._fake_quantize_learnable_per_channel_affine(*theirs, zero, axis, *limits, 1.0)
    (y * weights).sum().backward()

    assert ours[1].grad is not None
    assert theirs[1].grad is not None
    assert ours[1].grad.shape == scale.shape
    torch.testing.assert_close(ours[1].grad, theirs[1].grad.view_as(scale), rtol=1e-4, atol=1e-3)
    assert torch.equal(ours[0].grad, theirs[0].grad)


def test_scale_gradient_of_a_large_tensor_does_not_cancel() -> None:
    """Gradients with a mean, and inputs without a sign, make large sums of products."""
    torch.manual_seed(0)
    x, grad = torch.rand(16, 64, 56, 56), torch.randn(16, 64, 56, 56) + 1
    scale = torch.tensor(1 / 256, requires_grad=True)

    fake_quantize(x, scale, 0, 255).backward(grad)

    code = x.double() * 256
    inside = code.round() <= 255
    error = code.round().clamp(max=255) - torch.where(inside, code, 0)
    assert scale.grad is not None
    exact = (grad.double() * error).sum()
    torch.testing.assert_close(scale.grad.double(), exact, rtol=0, atol=2.0)


def test_gradients_of_a_learned_scale_can_be_differentiated() -> None:
    """As a penalty on the gradient does."""
    x, scale = torch.randn(8, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    (grad,) = torch.autograd.grad(
        fake_quantize(x, scale, -8, 7).square().sum(), x, create_graph=True
    )
    grad.square().sum().backward()
    assert x.grad is not None
    assert scale.grad is not None


def test_ties_beside_an_odd_zero_point_go_one_way_compiled_and_not() -> None:
    x = torch.tensor([14.5, 13.5, -1.5, 3.2])
    found = []
    for compiled in (False, True):
        leaf, scale = x.clone().requires_grad_(), torch.tensor(1.0, requires_grad=True)
        offset = torch.tensor(-1.0, requires_grad=True)
        function = torch.compile(fake_quantize, backend="aot_eager") if compiled else fake_quantize
        function(leaf, scale, 0, 15, None, offset).sum().backward()
        found.append((leaf.grad, scale.grad, offset.grad))
    torch.testing.assert_close(*found)
    assert found[0][0].tolist() == [1, 1, 0, 1]


def straight_through(x: Tensor, scale: Tensor) -> Tensor:
    """Float8 fake quantization as autograd sees it when rounding is the identity."""
    code = x / scale
    in_range = code.abs() < 464  # what lies half a step beyond 448 still rounds to it
    code = torch.where(in_range, code, code.detach().clamp(-448, 448))
    return (code + (code.to(torch.float8_e4m3fn).float() - code).detach()) * scale


def test_float8_gradients_are_autograds() -> None:
    scale = torch.tensor(0.125)
    x = torch.cat([torch.randn(64) * 200, torch.tensor([460.0, 500.0, -500.0])]) * scale
    weights = torch.randn_like(x)
    ours = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
    theirs = [x.clone().requires_grad_(), scale.clone().requires_grad_()]

    (fake_quantize(*ours, -FP8_MAX, FP8_MAX) * weights).sum().backward()
    (straight_through(*theirs) * weights).sum().backward()

    assert torch.equal(ours[0].grad, theirs[0].grad)
    torch.testing.assert_close(ours[1].grad, theirs[1].grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("axis", [None, 0], ids=["per-tensor", "per-channel"])
@pytest.mark.parametrize("amax", [56.0, 0.7], ids=["exact-scale", "rounded-scale"])
def test_float8_gradient_passes_at_amax(axis: int | None, amax: float) -> None:
    """Each channel's largest weight must go on learning."""
    x = torch.tensor([[amax, -amax, amax / 2]], requires_grad=True)
    scale = amax_to_scale(torch.tensor(amax if axis is None else [amax]), FP8_MAX)

    fake_quantize(x, scale, -FP8_MAX, FP8_MAX, axis).sum().backward()

    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1, 1]]


def e4m3_values() -> np.ndarray:
    """The 127 non-negative numbers of float8 E4M3, from their bits: code i has mantissa i % 8."""
    codes = np.arange(127)
    exponent, mantissa = codes // 8, codes % 8
    subnormal = mantissa / 8 * 2.0**-6
    return np.where(exponent == 0, subnormal, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))


def test_float8_rounds_to_the_nearest_number() -> None:
    values = e4m3_values()
    assert values[-1] == FP8_MAX
    middles = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, middles, middles * 1.001, middles * 0.999, [449, 1e6]])
    x = x.astype(np.float32)
    distance = np.abs(np.minimum(x, 448)[:, None].astype(np.float64) - values)
    nearest = distance.argmin(1)
    tie = (distance == distance.min(1, keepdims=True)).sum(1) == 2
    expected = values[nearest + (tie & (nearest % 2 == 1))]

    codes = encode(torch.from_numpy(x), torch.tensor(1.0), -FP8_MAX, FP8_MAX)
    negative = encode(torch.from_numpy(-x), torch.tensor(1.0), -FP8_MAX, FP8_MAX)

    np.testing.assert_array_equal(codes.numpy(), expected)
    np.testing.assert_array_equal(negative.numpy(), -expected)


@pytest.mark.parametrize("axis", [None, 1], ids=["per-tensor", "per-channel"])
def test_float8_values_are_the_casts(axis: int | None) -> None:
    x, scale = sample(FP8_MAX, axis)
    step = along_axis(scale, axis, 4)

    y = fake_quantize(x, scale, -FP8_MAX, FP8_MAX, axis)

    expected = (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step
    assert torch.equal(y, expected)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("limits", [*RANGES, pytest.param(Range(-448, 448), id="fp8")])
def test_idempotent_on_its_own_grid(limits: Range, axis: int | None) -> None:
    x, scale = sample(limits.qmax, axis, seed=4)

    once = fake_quantize(x, scale, *limits, axis)

    assert torch.equal(fake_quantize(once, scale, *limits, axis), once)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("axis", [None, 1], ids=["per-tensor", "per-channel"])
def test_half_inputs_are_computed_in_float32(dtype: torch.dtype, axis: int | None) -> None:
    limits = Range(-128, 127)
    x, scale = sample(limits.qmax, axis)
    half = x.to(dtype).requires_grad_()

    y = fake_quantize(half, scale, *limits, axis)
    y.sum().backward()

    assert y.dtype is dtype
    expected = numpy_codes(half.detach().float(), scale, limits, axis)
    expected = torch.from_numpy(expected) * along_axis(scale, axis, 4)
    assert torch.equal(y.detach(), expected.to(dtype))
    assert half.grad is not None
    assert half.grad.dtype is dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_autocast_changes_nothing(dtype: torch.dtype) -> None:
    x, scale = sample(127, 1)
    x = x.to(dtype)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = fake_quantize(x, scale, -128, 127, 1)

    assert y.dtype is dtype
    assert torch.equal(y, fake_quantize(x, scale, -128, 127, 1))


def test_input_and_layout_are_kept() -> None:
    x, scale = sample(127, 1)
    x = x.contiguous(memory_format=torch.channels_last)
    before = x.clone()

    y = fake_quantize(x, scale, -128, 127, 1)

    assert torch.equal(x, before)
    assert y.data_ptr() != x.data_ptr()
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", [(), (0, 3)], ids=["scalar", "empty"])
def test_any_shape(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)

    y = fake_quantize(x, torch.tensor(0.1), -128, 127)
    y.sum().backward()

    assert y.shape == x.shape
    assert x.grad is not None


def test_nan_stays_visible_and_infinity_saturates() -> None:
    y = fake_quantize(torch.tensor([math.nan, math.inf, -math.inf]), torch.tensor(0.5), -128, 127)

    assert y[0].isnan()
    assert y[1:].tolist() == [63.5, -64.0]


@pytest.mark.parametrize(
    ("amax", "expected"),
    [
        pytest.param(12.7, np.float32(12.7) / np.float32(127), id="plain"),
        pytest.param(0.0, np.float32(1) / np.float32(127), id="zero"),
        pytest.param(1e-45, np.finfo(np.float32).tiny, id="smallest-denormal"),
        pytest.param(1e-38, np.finfo(np.float32).tiny, id="denormal"),
        pytest.param(3e38, np.float32(3e38) / np.float32(127), id="huge"),
    ],
)
def test_amax_to_scale(amax: float, expected: float) -> None:
    scale = amax_to_scale(torch.tensor([amax]), 127)

    assert scale.tolist() == [float(expected)]
    assert (1 / scale).isfinite().all()
    assert fake_quantize(torch.tensor([0.0, amax]), scale, -127, 127, 0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_scale_is_float32(dtype: torch.dtype) -> None:
    scale = amax_to_scale(torch.tensor([1.0, 0.0], dtype=dtype), 127)

    assert scale.dtype is torch.float32
    assert scale.tolist() == [float(np.float32(1) / np.float32(127))] * 2


@pytest.mark.parametrize("qmax", [1, 7, 127, 255], ids=lambda q: f"qmax={q}")
def test_amax_maps_to_the_largest_code(qmax: int) -> None:
    amax = torch.rand(1000) * 10 + 1e-3
    scale = amax_to_scale(amax, qmax)

    assert (encode(amax, scale, -qmax, qmax, 0) == qmax).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_round_to_dtype(dtype: torch.dtype) -> None:
    x = torch.randn(100) * 100

    rounded = round_to_dtype(x, dtype)

    assert rounded.dtype is torch.float32
    assert torch.equal(rounded, x.to(dtype).float())


@pytest.mark.parametrize("noise", [1e-6, 1e-2, 1.0, 10.0], ids=lambda n: f"noise={n}")
def test_sqnr_is_numpys(noise: float) -> None:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(3, 50)).astype(np.float32)
    y = x + generator.normal(size=x.shape).astype(np.float32) * np.float32(noise)
    power = np.square(x.astype(np.float64)).sum() / np.square(x.astype(np.float64) - y).sum()

    sqnr = sqnr_db(torch.from_numpy(x).requires_grad_(), torch.from_numpy(y))

    assert sqnr == pytest.approx(10 * np.log10(power), rel=1e-12)


def test_sqnr_of_equal_tensors_is_infinite() -> None:
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.ones(3)) == -math.inf


@pytest.mark.parametrize("axis", [None, 0], ids=["per-tensor", "per-channel"])
def test_compiled_is_eager(axis: int | None) -> None:
    x, scale = sample(127, axis)

    def run(x: Tensor) -> Tensor:
        return fake_quantize(x, scale, -128, 127, axis)

    eager, compiled = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected = run(eager)
    expected.square().sum().backward()
    y = torch.compile(run, fullgraph=True)(compiled)
    y.square().sum().backward()

    assert torch.equal(y, expected)
    assert torch.equal(compiled.grad, eager.grad)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("limits", SOME_RANGES)
def test_cuda_is_cpu_within_one_code_at_ties(limits: Range, axis: int | None) -> None:
    x, scale = sample(limits.qmax, axis)
    step = along_axis(scale, axis, 4)
    here, there = x.clone().requires_grad_(), x.cuda().requires_grad_()

    y = fake_quantize(here, scale, *limits, axis)
    y.sum().backward()
    z = fake_quantize(there, scale.cuda(), *limits, axis)
    z.sum().backward()

    tie = ((x / step).abs().frac() - 0.5).abs() < 1e-4
    difference = ((y - z.cpu()) / step).abs()
    assert difference.max() <= 1.001
    assert difference[~tie].max() < 1e-3
    assert torch.equal(here.grad[~tie], there.grad.cpu()[~tie])
