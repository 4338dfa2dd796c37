from __future__ import annotations

import copy
import math
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lq import Mode, Quantizer, QuantSpec

PER_TENSOR = QuantSpec("int8")
PER_CHANNEL = QuantSpec("int8", axis=0, narrow=True)
LEARNED = QuantSpec("int8", range="lsq")
SPECS = [
    pytest.param(PER_TENSOR, None, id="per-tensor"),
    pytest.param(PER_CHANNEL, 3, id="per-channel"),
    pytest.param(LEARNED, None, id="learned"),
    pytest.param(QuantSpec("int4", axis=1, range="lsq"), 4, id="learned-per-channel"),
    pytest.param(QuantSpec("fp8_e4m3"), None, id="fp8"),
]
X = torch.linspace(-3, 3, 12).view(3, 4)


def calibrated(spec: QuantSpec, channels: int | None = None, amax: float = 1.27) -> Quantizer:
    quantizer = Quantizer(spec, channels, "net.fc.input_quantizer")
    quantizer.amax = torch.full(() if channels is None else (channels,), amax)
    return quantizer


class SyncCounter(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a value out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "item"):
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("spec", "channels"), SPECS)
def test_scale_has_its_final_shape_from_the_start(spec: QuantSpec, channels: int | None) -> None:
    quantizer = Quantizer(spec, channels)

    assert quantizer.scale is not None
    assert quantizer.scale.shape == (() if channels is None else (channels,))
    assert quantizer.scale.dtype is torch.float32
    assert quantizer.scale.isnan().all()
    assert not quantizer.is_calibrated
    assert isinstance(quantizer.scale, nn.Parameter) is spec.learns_range
    assert list(quantizer.state_dict()) == ["scale"]


@pytest.mark.parametrize(("spec", "channels"), SPECS)
def test_uncalibrated_refuses_by_name(spec: QuantSpec, channels: int | None) -> None:
    quantizer = Quantizer(spec, channels, "net.fc.input_quantizer")

    with pytest.raises(RuntimeError, match=r"'net\.fc\.input_quantizer' is not calibrated"):
        quantizer(X)


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -0.1], ids=str)
@pytest.mark.parametrize(("spec", "channels"), SPECS[:2])
def test_a_loaded_scale_that_is_no_scale_refuses(
    spec: QuantSpec, channels: int | None, value: float
) -> None:
    quantizer = calibrated(spec, channels)
    quantizer(X)
    scale = torch.full_like(quantizer.scale, 0.1)
    scale.view(-1)[-1] = value

    quantizer.load_state_dict({"scale": scale})

    assert not quantizer.is_calibrated
    with pytest.raises(RuntimeError, match="not calibrated"):
        quantizer(X)


def test_bypass_returns_the_input_itself() -> None:
    quantizer = Quantizer(PER_TENSOR)
    quantizer.mode = Mode.BYPASS

    assert quantizer(X) is X


def test_observe_shows_the_input_to_the_observer() -> None:
    class Observer:
        def __init__(self) -> None:
            self.seen: list[Tensor] = []

        def observe(self, x: Tensor) -> None:
            self.seen.append(x)

    quantizer = Quantizer(PER_TENSOR)
    quantizer.mode = Mode.OBSERVE
    assert quantizer(X) is X

    observer = Observer()
    quantizer.observer = observer
    assert quantizer(X) is X
    assert len(observer.seen) == 1
    assert observer.seen[0] is X


def test_quantize_is_torchs() -> None:
    quantizer = calibrated(PER_TENSOR)

    assert torch.equal(
        quantizer(X), torch.fake_quantize_per_tensor_affine(X, quantizer.scale.item(), 0, -128, 127)
    )


@pytest.mark.parametrize("axis", [0, 1], ids=lambda axis: f"axis={axis}")
def test_quantize_per_channel_is_torchs(axis: int) -> None:
    channels = X.shape[axis]
    quantizer = Quantizer(QuantSpec("int8", axis=axis, narrow=True), channels)
    quantizer.amax = torch.rand(channels) + 0.5

    zero = torch.zeros(channels, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(X, quantizer.scale, zero, axis, -127, 127)
    torch.testing.assert_close(quantizer(X), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp16", torch.float16), ("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_float_formats_round_and_have_no_scale(name: str, dtype: torch.dtype) -> None:
    quantizer = Quantizer(QuantSpec(name))
    x = torch.randn(100)

    assert quantizer.scale is None
    assert quantizer.amax is None
    assert quantizer.is_calibrated
    assert quantizer.state_dict() == {}
    assert torch.equal(quantizer(x), x.to(dtype).float())
    assert repr(quantizer) == f"Quantizer({name})"
    with pytest.raises(ValueError, match=f"'quantizer' is {name} and has no range"):
        quantizer.amax = torch.tensor(1.0)
    quantizer.reset_parameters()
    assert quantizer.is_calibrated


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_bypassed_float_formats_do_not_round(name: str) -> None:
    quantizer = Quantizer(QuantSpec(name))
    assert quantizer.compute_dtype is not None

    quantizer.mode = Mode.BYPASS

    assert quantizer.compute_dtype is None
    assert quantizer(X) is X


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
def test_integer_tensors_pass_through(dtype: torch.dtype, mode: Mode) -> None:
    quantizer = Quantizer(PER_TENSOR)  # uncalibrated: it must not even look
    quantizer.mode = mode
    x = torch.ones(3, dtype=dtype)

    assert quantizer(x) is x


@pytest.mark.parametrize(
    ("amax", "message"),
    [
        pytest.param([1.0, math.nan, 1.0], r"finite.*nan", id="nan"),
        pytest.param([1.0, math.inf, 1.0], r"finite.*inf", id="inf"),
        pytest.param([1.0, -1.0, 1.0], r"not negative.*-1\.0", id="negative"),
        pytest.param([1.0, 1.0], r"shape \[3\].*\[2\]", id="shape"),
        pytest.param(1.0, r"shape \[3\].*\[\]", id="scalar"),
        pytest.param([[1.0, 1.0, 1.0]], r"shape \[3\].*\[1, 3\]", id="dimensions"),
    ],
)
def test_wrong_ranges_are_refused_and_change_nothing(amax: Any, message: str) -> None:
    quantizer = calibrated(PER_CHANNEL, 3)
    before = quantizer.scale.clone()

    with pytest.raises(ValueError, match=rf"'net\.fc\.input_quantizer'.*{message}"):
        quantizer.amax = torch.tensor(amax)

    assert torch.equal(quantizer.scale, before)


@pytest.mark.parametrize("given", [1.27, torch.tensor(1.27)], ids=["float", "tensor"])
@pytest.mark.parametrize("spec", [PER_TENSOR, LEARNED], ids=["buffer", "learned"])
def test_amax_sets_the_scale_in_place(given: Any, spec: QuantSpec) -> None:
    quantizer = Quantizer(spec)
    scale = quantizer.scale

    quantizer.amax = given

    assert quantizer.scale is scale, "optimizers and references hold this tensor"
    assert scale.item() == (torch.tensor(1.27) / 127).item()
    assert quantizer.amax.item() == pytest.approx(1.27)
    assert quantizer.is_calibrated
    assert not quantizer.amax.requires_grad


def test_zero_range_gets_a_positive_scale() -> None:
    quantizer = Quantizer(PER_CHANNEL, 3)
    quantizer.amax = torch.tensor([0.0, 1e-45, 1.0])

    assert (quantizer.scale > 0).all()
    assert quantizer.is_calibrated
    assert quantizer(torch.zeros(3, 4)).tolist() == torch.zeros(3, 4).tolist()


def test_reset_forgets() -> None:
    quantizer = calibrated(PER_TENSOR)
    quantizer.reset_parameters()

    assert not quantizer.is_calibrated
    with pytest.raises(RuntimeError, match="not calibrated"):
        quantizer(X)


@pytest.mark.parametrize(
    ("spec", "channels"),
    [pytest.param(PER_CHANNEL, None, id="none-given"), pytest.param(PER_TENSOR, 3, id="given")],
)
def test_channels_go_with_the_axis(spec: QuantSpec, channels: int | None) -> None:
    with pytest.raises(ValueError, match=rf"axis={spec.axis} with channels={channels}"):
        Quantizer(spec, channels)


@pytest.mark.parametrize(
    ("quantizer", "expected"),
    [
        (Quantizer(PER_TENSOR), "int8, uncalibrated"),
        (Quantizer(PER_CHANNEL, 3), "int8, axis=0, uncalibrated"),
        (calibrated(PER_TENSOR), "int8, scale=0.01"),
        (calibrated(PER_CHANNEL, 3), "int8, axis=0, scale=0.01..0.01"),
        (calibrated(LEARNED), "int8, lsq, scale=0.01"),
        (calibrated(QuantSpec("int4", signed=False), amax=15.0), "uint4, scale=1"),
        (calibrated(QuantSpec("fp8_e4m3"), amax=448.0), "fp8_e4m3, scale=1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_repr(quantizer: Quantizer, expected: str) -> None:
    assert repr(quantizer) == f"Quantizer({expected})"
    quantizer.mode = Mode.BYPASS
    assert repr(quantizer) == f"Quantizer({expected}, bypass)"


@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "float"])
@pytest.mark.parametrize(("spec", "channels"), SPECS)
def test_scale_stays_float32_to_the_last_bit(
    spec: QuantSpec, channels: int | None, cast: str
) -> None:
    model = nn.Sequential(nn.Linear(2, 2), calibrated(spec, channels, amax=1 / 3))
    before = model[1].scale.detach().clone()

    getattr(model, cast)()

    scale = model[1].scale
    assert model[0].weight.dtype is not torch.float32 or cast == "float"
    assert scale.dtype is torch.float32
    assert torch.equal(scale, before)
    assert isinstance(scale, nn.Parameter) is spec.learns_range
    x = X.to(model[0].weight.dtype)
    assert model[1](x).dtype is x.dtype


def test_learned_scale_with_a_gradient_can_be_cast() -> None:
    quantizer = calibrated(LEARNED)
    quantizer(X).sum().backward()

    quantizer.half()
    quantizer.scale.grad = None
    quantizer(X).sum().backward()

    assert quantizer.scale.dtype is torch.float32
    assert quantizer.scale.grad.dtype is torch.float32


@pytest.mark.parametrize(("spec", "channels"), SPECS)
def test_scale_moves_with_the_model(spec: QuantSpec, channels: int | None) -> None:
    quantizer = calibrated(spec, channels)

    quantizer.to("meta", torch.float16)

    assert quantizer.scale.is_meta
    assert quantizer.scale.dtype is torch.float32


@pytest.mark.parametrize("channels", [None, 3], ids=["per-tensor", "per-channel"])
def test_learned_scale_trains(channels: int | None) -> None:
    axis = None if channels is None else 0
    quantizer = calibrated(QuantSpec("int8", axis=axis, range="lsq"), channels)
    x = X.clone().requires_grad_()
    before = quantizer.scale.detach().clone()

    assert dict(quantizer.named_parameters()).keys() == {"scale"}
    torch.nn.functional.mse_loss(quantizer(x), X).backward()
    assert quantizer.scale.grad.shape == quantizer.scale.shape
    assert x.grad is not None
    torch.optim.SGD(quantizer.parameters(), 0.01).step()

    assert (quantizer.scale != before).all()
    # The range was too small, so training widens it.
    assert (quantizer.scale > before).any()


def test_a_scale_that_is_not_learned_has_no_gradient() -> None:
    quantizer = calibrated(PER_TENSOR)

    assert not list(quantizer.parameters())
    assert not quantizer.scale.requires_grad


def test_learned_scale_that_stepped_over_zero_restores_bit_equal() -> None:
    quantizer = calibrated(LEARNED)
    with torch.no_grad():
        quantizer.scale.sub_(1.0)  # one step of an optimizer
    before = quantizer(X)

    restored = Quantizer(LEARNED)
    restored.load_state_dict(quantizer.state_dict())

    assert torch.equal(restored(X), before)


def test_learned_scale_that_stepped_over_zero_comes_back() -> None:
    quantizer = calibrated(LEARNED)
    with torch.no_grad():
        quantizer.scale.sub_(1.0)

    torch.nn.functional.mse_loss(quantizer(X), X).backward()

    assert quantizer.scale.grad < 0, "a wider range is better, and descent must find it"


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda quantizer: pickle.loads(pickle.dumps(quantizer))],
    ids=["deepcopy", "pickle"],
)
@pytest.mark.parametrize(("spec", "channels"), SPECS)
def test_copies_are_independent(spec: QuantSpec, channels: int | None, clone: Any) -> None:
    quantizer = calibrated(spec, channels)
    expected = quantizer(X)
    quantizer.mode = Mode.BYPASS

    other = clone(quantizer)

    assert other.mode is Mode.BYPASS
    assert other.spec == spec
    other.mode = Mode.QUANTIZE
    assert torch.equal(other(X), expected)
    quantizer.reset_parameters()
    assert other.is_calibrated
    assert torch.equal(other(X), expected)


@pytest.mark.parametrize(("spec", "channels"), SPECS)
def test_state_dict_round_trip(spec: QuantSpec, channels: int | None) -> None:
    quantizer = calibrated(spec, channels, amax=1 / 3)
    other = Quantizer(spec, channels)

    other.load_state_dict(quantizer.state_dict())

    assert other.is_calibrated
    assert torch.equal(other(X), quantizer(X))


@pytest.mark.parametrize(("spec", "channels"), SPECS)
def test_no_host_sync_once_calibrated(spec: QuantSpec, channels: int | None) -> None:
    quantizer = calibrated(spec, channels)
    with SyncCounter() as counter:
        quantizer(X)
        quantizer(X)
    assert not counter.calls

    restored = Quantizer(spec, channels)
    restored.load_state_dict(quantizer.state_dict())
    with SyncCounter() as counter:
        restored(X)
        restored(X)
    assert not counter.calls, "a loaded scale is looked at while loading"


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
@pytest.mark.parametrize(("spec", "channels"), SPECS)
def test_export_has_one_fake_quantize(spec: QuantSpec, channels: int | None, strict: bool) -> None:
    quantizer = calibrated(spec, channels)

    program = torch.export.export(quantizer, (X,), strict=strict)

    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.lq.fake_quantize.default) == 1
    node = next(n for n in program.graph.nodes if n.target is torch.ops.lq.fake_quantize.default)
    assert node.args[2:5] == (spec.qmin, spec.qmax, spec.axis)
    assert torch.equal(program.module()(X), quantizer(X))


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_right_after_loading(strict: bool) -> None:
    quantizer = Quantizer(PER_TENSOR)
    quantizer.load_state_dict(calibrated(PER_TENSOR).state_dict())

    program = torch.export.export(quantizer, (X,), strict=strict)

    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert torch.ops.lq.fake_quantize.default in targets


@pytest.mark.parametrize("loaded", [False, True], ids=["calibrated", "loaded"])
@pytest.mark.parametrize(("spec", "channels"), SPECS)
def test_compiles_without_graph_breaks(spec: QuantSpec, channels: int | None, loaded: bool) -> None:
    torch.compiler.reset()
    quantizer = calibrated(spec, channels)
    if loaded:
        quantizer.load_state_dict(quantizer.state_dict())
    expected = calibrated(spec, channels)(X)

    y = torch.compile(quantizer, fullgraph=True, backend="eager")(X)

    assert torch.equal(y, expected)


def test_clipped_is_numpys_count() -> None:
    quantizer = calibrated(PER_TENSOR)
    codes = X.numpy() / quantizer.scale.numpy()

    expected = (codes < -128.5) | (codes > 127.5)
    assert expected.any()
    assert quantizer.clipped(X).tolist() == expected.tolist()
