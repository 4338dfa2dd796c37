from __future__ import annotations

import copy
import inspect
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from timm.layers import Conv2dSame, StdConv2d
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import lq
from lq.calibration import calibrate_weights
from lq.layers import QUANT_CLASSES, QuantLayer, quantized_class
from lq.qat import save_memory
from lq.surgery import quantizers


class Gained(nn.Conv2d):
    """A user's subclass with a forward of its own."""

    def forward(self, x: Tensor, gain: float = 1.0, *, flip: bool = False) -> Tensor:
        y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return (-y if flip else y) * gain


class PreActivated(nn.Linear):
    """A user's subclass that calls the original forward."""

    def forward(self, features: Tensor) -> Tensor:
        return super().forward(F.relu(features))


class OtherConvForward(nn.Conv2d):
    """A user's subclass that changes what ``nn.Conv2d.forward`` calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return 2 * super()._conv_forward(input, weight, bias)


class TwoInputs(nn.Linear):
    """A user's subclass with a second tensor input."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(x, self.weight, self.bias) + residual, residual


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    axis: int = 0
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - never changed


CASES = {
    "conv1d": Case(lambda: nn.Conv1d(3, 4, 3), (2, 3, 8)),
    "conv2d": Case(lambda: nn.Conv2d(3, 4, 3), (2, 3, 8, 8)),
    "conv3d": Case(lambda: nn.Conv3d(3, 4, 2), (2, 3, 4, 4, 4)),
    "conv-transpose1d": Case(lambda: nn.ConvTranspose1d(3, 4, 3), (2, 3, 8), 1),
    "conv-transpose2d": Case(lambda: nn.ConvTranspose2d(3, 4, 3), (2, 3, 8, 8), 1),
    "conv-transpose3d": Case(lambda: nn.ConvTranspose3d(3, 4, 2), (2, 3, 4, 4, 4), 1),
    "linear": Case(lambda: nn.Linear(6, 5), (4, 6)),
    "linear-3d-input": Case(lambda: nn.Linear(6, 5), (2, 3, 6)),
    "linear-no-bias": Case(lambda: nn.Linear(6, 5, bias=False), (4, 6)),
    "conv-unbatched": Case(lambda: nn.Conv2d(3, 4, 3), (3, 8, 8)),
    "conv-grouped": Case(lambda: nn.Conv2d(6, 8, 3, groups=2), (2, 6, 8, 8)),
    "conv-depthwise": Case(lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), (2, 6, 8, 8)),
    "conv-strided": Case(
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
        (2, 3, 8, 8),
    ),
    "conv-same": Case(lambda: nn.Conv2d(3, 4, 3, padding="same"), (2, 3, 8, 8)),
    **{
        f"conv-{mode}": Case(
            lambda mode=mode: nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode), (2, 3, 8, 8)
        )
        for mode in ("circular", "reflect", "replicate")
    },
    "conv-transpose-grouped": Case(
        lambda: nn.ConvTranspose2d(6, 8, 3, stride=2, groups=2), (2, 6, 5, 5), 1
    ),
    "conv-transpose-output-size": Case(
        lambda: nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1),
        (2, 3, 5, 5),
        1,
        {"output_size": [10, 10]},
    ),
    "timm-conv2d-same": Case(lambda: Conv2dSame(3, 4, 3, stride=2), (2, 3, 7, 7)),
    "timm-std-conv2d": Case(lambda: StdConv2d(3, 4, 3), (2, 3, 7, 7)),
    "own-forward": Case(lambda: Gained(3, 4, 3), (2, 3, 8, 8), 0, {"gain": 3.0, "flip": True}),
    "own-forward-calls-super": Case(lambda: PreActivated(6, 5), (4, 6)),
    "own-conv-forward": Case(lambda: OtherConvForward(3, 4, 3), (2, 3, 8, 8)),
}
ALL = pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])
INT8 = lq.Recipe()


def built(case: Case, recipe: lq.Recipe = INT8) -> tuple[nn.Module, QuantLayer, Tensor]:
    """A float layer, the same layer quantized and calibrated, and an input."""
    torch.manual_seed(0)
    layer, x = case.make(), torch.randn(case.shape)
    quantized = lq.quantize(nn.Sequential(copy.deepcopy(layer)), recipe)
    # Calibration through the layer itself: a Sequential passes on no keyword arguments.
    lq.calibrate(quantized, [x], progress=False)
    return layer, quantized[0], x


def weight_reference(weight: Tensor, axis: int, qmax: int = 127) -> Tensor:
    """Per-channel symmetric quantization with torch's operator."""
    amax = weight.detach().abs().transpose(0, axis).flatten(1).amax(1)
    zero = torch.zeros_like(amax, dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, amax / qmax, zero, axis, -qmax, qmax)


def input_reference(x: Tensor) -> Tensor:
    return torch.fake_quantize_per_tensor_affine(x, x.abs().max().item() / 127, 0, -128, 127)


def float_reference(layer: nn.Module, case: Case, x: Tensor) -> Tensor:
    """The float layer, run on a weight and an input quantized by hand."""
    reference = copy.deepcopy(layer)
    reference.weight.data = weight_reference(layer.weight.data, case.axis)
    return reference(input_reference(x), **case.kwargs)


@ALL
def test_output_is_the_float_layers_on_quantized_tensors(case: Case) -> None:
    layer, quantized, x = built(case)

    y = quantized(x, **case.kwargs)

    assert torch.equal(y, float_reference(layer, case, x))
    assert not torch.equal(y, layer(x, **case.kwargs))


@ALL
def test_scales_are_per_output_channel(case: Case) -> None:
    layer, quantized, x = built(case)
    weight = layer.weight.detach().numpy()
    others = tuple(i for i in range(weight.ndim) if i != case.axis)

    assert quantized.weight_quantizer.amax.numpy() == pytest.approx(
        abs(weight).max(others), rel=1e-6
    )
    assert quantized.weight_quantizer.spec.axis == case.axis
    assert quantized.input_quantizer.amax.item() == pytest.approx(x.abs().max().item(), rel=1e-6)


@ALL
def test_gradients_are_those_of_torchs_operators(case: Case) -> None:
    layer, quantized, x = built(case)
    here, there = x.clone().requires_grad_(), x.clone().requires_grad_()

    quantized(here, **case.kwargs).square().sum().backward()
    bypass = copy.deepcopy(layer)
    weight = nn.Parameter(layer.weight.detach().clone())
    with parametrize.cached():
        del bypass.weight
        bypass.weight = weight_reference(weight, case.axis)
        bypass(input_reference(there), **case.kwargs).square().sum().backward()

    assert quantized.weight.grad is not None
    torch.testing.assert_close(quantized.weight.grad, weight.grad)
    torch.testing.assert_close(here.grad, there.grad)
    if layer.bias is not None:
        torch.testing.assert_close(quantized.bias.grad, bypass.bias.grad)


@ALL
def test_is_still_the_float_class(case: Case) -> None:
    layer, quantized, _ = built(case)

    assert isinstance(quantized, type(layer))
    assert isinstance(quantized, QuantLayer)
    assert [n for n, _ in quantized.named_parameters()] == [n for n, _ in layer.named_parameters()]
    assert type(quantized).__name__ == f"Quant{type(layer).__name__}"


@ALL
def test_forward_signature_is_kept(case: Case) -> None:
    layer, quantized, _ = built(case)

    def shape(module: nn.Module) -> list[tuple[str, Any, Any]]:
        parameters = inspect.signature(module.forward).parameters.values()
        return [(p.name, p.kind, p.default) for p in parameters]

    assert shape(quantized) == shape(layer)


@ALL
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
def test_copies_give_equal_outputs(case: Case, how: str) -> None:
    _, quantized, x = built(case)
    if how == "pickle":
        clone = pickle.loads(pickle.dumps(quantized))
    elif how == "deepcopy":
        clone = copy.deepcopy(quantized)
    else:
        buffer = io.BytesIO()
        torch.save(quantized, buffer)
        buffer.seek(0)
        clone = torch.load(buffer, weights_only=False)

    assert type(clone) is type(quantized)
    assert clone.weight is not quantized.weight
    assert torch.equal(clone(x, **case.kwargs), quantized(x, **case.kwargs))
    quantized.weight_quantizer.reset_parameters()
    assert clone.weight_quantizer.is_calibrated


@ALL
def test_exports_two_fake_quantizers(case: Case) -> None:
    _, quantized, x = built(case)
    quantized.eval()

    program = torch.export.export(quantized, (x,), case.kwargs)

    targets = [n.target for n in program.graph.nodes if n.op == "call_function"]
    assert targets.count(torch.ops.lq.fake_quantize.default) == 2
    torch.testing.assert_close(program.module()(x, **case.kwargs), quantized(x, **case.kwargs))


@pytest.mark.skipif(
    torch.__version__.startswith("2.8."), reason="torch 2.8 does not trace shadowed parameters"
)
@ALL
@pytest.mark.parametrize("saving", [False, True], ids=["", "saving-memory"])
def test_compiles_without_graph_breaks(case: Case, saving: bool) -> None:
    _, quantized, x = built(case)
    save_memory(quantized, saving)
    torch.compiler.reset()

    compiled = torch.compile(quantized, fullgraph=True, backend="eager")

    assert torch.equal(compiled(x, **case.kwargs), quantized(x, **case.kwargs))


@ALL
def test_runs_leave_no_attributes(case: Case) -> None:
    _, quantized, x = built(case)
    before = set(vars(quantized))

    quantized(x, **case.kwargs)
    with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)):
        quantized(x.reshape(-1)[:1], **case.kwargs)

    assert set(vars(quantized)) == before


def test_every_kind_is_tested() -> None:
    elsewhere = {nn.MultiheadAttention}  # takes three inputs: test_attention.py
    assert {type(case.make()) for case in CASES.values()} >= set(QUANT_CLASSES) - elsewhere


def test_other_classes_are_refused() -> None:
    with pytest.raises(
        ValueError, match="Conv, ConvTranspose, Linear or attention class, but got BatchNorm2d"
    ):
        quantized_class(nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("args", "kwargs"),
    [
        pytest.param((2.0,), {}, id="positional"),
        pytest.param((), {"gain": 2.0}, id="keyword"),
        pytest.param((), {"flip": True, "gain": 2.0}, id="keywords"),
        pytest.param((), {}, id="defaults"),
    ],
)
def test_own_forward_takes_its_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    layer, quantized, x = built(CASES["own-forward"])

    case = CASES["own-forward"]._replace(kwargs=kwargs)
    if args:
        case = case._replace(kwargs={"gain": args[0]})
    expected = float_reference(layer, case, x)
    assert torch.equal(quantized(x, *args, **kwargs), expected)
    if not args:
        assert torch.equal(quantized(x=x, **kwargs), expected)


@pytest.mark.parametrize("name", ["fp16", "int8"])
def test_own_forward_may_return_anything(name: str) -> None:
    recipe = lq.Recipe.from_dict({"weights": name, "inputs": name})
    model = lq.quantize(nn.Sequential(TwoInputs(6, 5)), recipe)
    x, residual = torch.randn(4, 6), torch.randn(4, 5)
    layer = model[0]
    if name == "int8":
        layer.input_quantizer.amax = x.abs().max()
        calibrate_weights(model)

    y, second = layer(x, residual)

    assert y.shape == residual.shape
    assert torch.equal(second, residual)


FORMATS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.parametrize("name", FORMATS)
@ALL
def test_16_bit_layers_round_operands_and_result(case: Case, name: str) -> None:
    recipe = lq.Recipe.from_dict({"weights": name, "inputs": name})
    torch.manual_seed(0)
    layer, x = case.make(), torch.randn(case.shape)
    quantized = lq.quantize(nn.Sequential(copy.deepcopy(layer)), recipe)[0]

    def rounded(t: Tensor) -> Tensor:
        return t.to(FORMATS[name]).to(t.dtype)

    for parameter in layer.parameters():
        parameter.data = rounded(parameter.data)
    assert torch.equal(quantized(x, **case.kwargs), rounded(layer(rounded(x), **case.kwargs)))


@pytest.mark.parametrize("name", FORMATS)
def test_integer_weights_meet_16_bit_inputs(name: str) -> None:
    recipe = lq.Recipe.from_dict({"weights": "int8", "inputs": name})
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    model = lq.quantize(nn.Sequential(copy.deepcopy(layer)), recipe)
    calibrate_weights(model)

    def rounded(t: Tensor) -> Tensor:
        return t.to(FORMATS[name]).to(t.dtype)

    weight = rounded(weight_reference(layer.weight, 0))
    assert torch.equal(model(x), rounded(F.linear(rounded(x), weight, rounded(layer.bias))))


@pytest.mark.parametrize("bits", [2, 4, 8], ids=lambda bits: f"int{bits}")
def test_weight_only(bits: int) -> None:
    recipe = lq.Recipe.from_dict({"weights": f"int{bits}", "inputs": "fp32"})
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    model = lq.quantize(nn.Sequential(copy.deepcopy(layer)), recipe)
    calibrate_weights(model)

    weight = weight_reference(layer.weight, 0, 2 ** (bits - 1) - 1)
    assert torch.equal(model(x), F.conv2d(x, weight, layer.bias))


@pytest.mark.parametrize("axis", [None, 0], ids=["per-tensor", "per-channel"])
def test_float8_layer(axis: int | None) -> None:
    recipe = lq.Recipe.from_dict(
        {"weights": {"format": "fp8_e4m3", "axis": axis}, "inputs": "fp8_e4m3"}
    )
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    model = lq.quantize(nn.Sequential(copy.deepcopy(layer)), recipe)
    lq.calibrate(model, [x], progress=False)

    def rounded(t: Tensor, amax: Tensor) -> Tensor:
        scale = amax / 448
        return (t / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale

    amax = layer.weight.abs()
    weight = rounded(layer.weight, amax.max() if axis is None else amax.amax(1, keepdim=True))
    assert torch.equal(model(x), F.linear(rounded(x, x.abs().max()), weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
@pytest.mark.parametrize("name", ["conv2d", "linear", "conv-transpose2d", "timm-conv2d-same"])
def test_a_model_cast_to_16_bits_keeps_its_codes(name: str, dtype: torch.dtype) -> None:
    case = CASES[name]
    layer, quantized, x = built(case)
    y = quantized.to(dtype)(x.to(dtype))

    layer.to(dtype)
    amax = quantized.weight_quantizer.amax
    zero = torch.zeros_like(amax, dtype=torch.int32)
    scales = quantized.input_quantizer.scale.item(), quantized.weight_quantizer.scale
    inputs = torch.fake_quantize_per_tensor_affine(x.to(dtype).float(), scales[0], 0, -128, 127)
    layer.weight.data = torch.fake_quantize_per_channel_affine(
        layer.weight.data.float(), scales[1], zero, case.axis, -127, 127
    ).to(dtype)
    assert y.dtype is dtype
    assert torch.equal(y, layer(inputs.to(dtype)))


@pytest.mark.parametrize("name", ["conv2d", "linear", "conv-transpose2d", "timm-conv2d-same"])
def test_autocast_quantizes_in_float32(name: str) -> None:
    case = CASES[name]
    layer, quantized, x = built(case)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quantized(x)
        expected = float_reference(layer, case, x)

    assert y.dtype is expected.dtype is torch.bfloat16
    assert torch.equal(y, expected)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(6, 5), "weight", Doubled())


def weight_normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(6, 5))


def weight_normed_by_hook() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(6, 5))


def orthogonal() -> nn.Module:
    return parametrizations.orthogonal(nn.Linear(6, 5))


@pytest.mark.parametrize(
    "make",
    [parametrized, weight_normed, weight_normed_by_hook, orthogonal],
    ids=lambda f: f.__name__,
)
class TestComputedWeights:
    def test_output(self, make: Callable[[], nn.Module]) -> None:
        torch.manual_seed(0)
        layer, x = make(), torch.randn(4, 6)
        expected = F.linear(
            input_reference(x), weight_reference(layer.weight.detach(), 0), layer.bias
        )

        model = lq.calibrate(lq.quantize(nn.Sequential(layer), INT8), [x], progress=False)

        assert isinstance(model[0], QuantLayer)
        assert model[0] is layer
        assert torch.equal(model(x), expected)

    def test_training_reaches_the_parameters(self, make: Callable[[], nn.Module]) -> None:
        layer, x = make(), torch.randn(4, 6)
        model = lq.calibrate(lq.quantize(nn.Sequential(layer), INT8), [x], progress=False)

        model(x).square().sum().backward()

        assert all(p.grad is not None and p.grad.any() for p in model.parameters())

    def test_dequantize(self, make: Callable[[], nn.Module]) -> None:
        layer, x = make(), torch.randn(4, 6)
        cls, expected = type(layer), layer(x)
        names = list(layer.state_dict())

        model = lq.dequantize(lq.quantize(nn.Sequential(layer), INT8))

        # torch makes the class on top for each layer; what matters is what lies under it
        assert (type(layer).__name__, type(layer).__bases__) == (cls.__name__, cls.__bases__)
        assert torch.equal(model(x), expected)
        assert list(layer.state_dict()) == names
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight")
            assert type(layer) is nn.Linear
            torch.testing.assert_close(model(x), expected)


def test_deepcopy_of_a_parametrized_layer() -> None:
    x = torch.randn(4, 6)
    model = lq.calibrate(lq.quantize(nn.Sequential(parametrized()), INT8), [x], progress=False)

    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_parametrizations_can_be_removed_from_a_quantized_layer() -> None:
    x = torch.randn(4, 6)
    model = lq.calibrate(lq.quantize(nn.Sequential(parametrized()), INT8), [x], progress=False)
    expected = model(x)

    parametrize.remove_parametrizations(model[0], "weight")

    assert isinstance(model[0], QuantLayer)
    assert torch.equal(model(x), expected)


def test_parametrizing_a_quantized_layer() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(6, 5), torch.randn(4, 6)
    float_output = F.linear(x, 2 * layer.weight, layer.bias)
    model = lq.quantize(nn.Sequential(layer), INT8)

    parametrize.register_parametrization(layer, "weight", Doubled())
    lq.calibrate(model, [x], progress=False)

    weight = weight_reference(layer.weight.detach(), 0)
    assert torch.equal(model(x), F.linear(input_reference(x), weight, layer.bias))
    assert torch.equal(lq.dequantize(model)(x), float_output)


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(3, 4, 3), lambda: Conv2dSame(3, 4, 3)], ids=["conv2d", "own-forward"]
)
@pytest.mark.parametrize("first", ["prune", "quantize"])
def test_pruned_weights_stay_zero(make: Callable[[], nn.Module], first: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(make()), torch.randn(2, 3, 8, 8)
    seen: list[Tensor] = []
    if first == "prune":
        prune.l1_unstructured(model[0], "weight", 0.5)
        lq.quantize(model, INT8)
    else:
        lq.quantize(model, INT8)
        prune.l1_unstructured(model[0], "weight", 0.5)
    model[0].weight_quantizer.register_forward_hook(lambda m, args, y: seen.append(y.detach()))
    lq.calibrate(model, [x], progress=False)
    zero = model[0].weight_mask == 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        assert not model[0].weight_orig.grad[zero].any()
        optimizer.step()

    assert zero.sum() == zero.numel() // 2
    assert all((weight[zero] == 0).all() for weight in seen)
    assert seen[-1][~zero].any()
    before = model(x)
    prune.remove(model[0], "weight")
    assert (model[0].weight[zero] == 0).all()
    assert torch.equal(model(x), before)


def test_pruned_model_dequantizes_to_the_pruned_model() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3)), torch.randn(2, 3, 8, 8)
    prune.l1_unstructured(model[0], "weight", 0.5)
    expected = model(x)

    lq.calibrate(lq.quantize(model, INT8), [x], progress=False)

    assert torch.equal(lq.dequantize(model)(x), expected)
    assert prune.is_pruned(model)


def test_hooks_survive() -> None:
    layer, calls = nn.Linear(6, 5), []
    layer.register_forward_pre_hook(lambda m, args: calls.append("before"))
    layer.register_forward_hook(lambda m, args, y: calls.append("after"))
    layer.register_full_backward_hook(lambda m, gx, gy: calls.append("backward"))
    x = torch.randn(4, 6)
    model = lq.calibrate(lq.quantize(nn.Sequential(layer), INT8), [x], progress=False)
    calls.clear()

    model(x.requires_grad_()).sum().backward()

    assert calls == ["before", "after", "backward"]


def test_held_references_stay_valid() -> None:
    layer = nn.Linear(6, 5)
    parameters = list(layer.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1)
    x = torch.randn(4, 6)

    model = lq.calibrate(lq.quantize(nn.Sequential(layer), INT8), [x], progress=False)
    before = model(x)
    before.sum().backward()
    optimizer.step()

    assert model[0] is layer
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert not torch.equal(model(x), before)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 6)
        self.decoder = nn.Linear(6, 20, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.decoder(self.embedding(tokens))


def test_tied_weights_stay_tied() -> None:
    model, tokens = Tied(), torch.arange(20).view(4, 5)
    expected = model(tokens)

    lq.calibrate(lq.quantize(model, INT8), [tokens], progress=False)

    assert model.decoder.weight is model.embedding.weight
    assert len(list(model.parameters())) == 1
    assert model(tokens).shape == expected.shape
    clone = copy.deepcopy(model)
    assert clone.decoder.weight is clone.embedding.weight
    assert torch.equal(lq.dequantize(model)(tokens), expected)


class UsedTwice(nn.Module):
    """One layer under two names, and called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.second(10 * self.first(x))


def test_a_shared_layer_is_quantized_once() -> None:
    model, x = UsedTwice(), torch.randn(4, 6)
    largest = max(x.abs().max().item(), (10 * model.first(x)).abs().max().item())

    lq.calibrate(lq.quantize(model, INT8), [x], progress=False)

    assert model.first is model.second
    assert list(quantizers(model)) == ["first.input_quantizer", "first.weight_quantizer"]
    assert model.first.input_quantizer.amax.item() == pytest.approx(largest, rel=1e-6)
    assert model(x).isfinite().all()
    clone = copy.deepcopy(model)
    assert clone.first is clone.second
    assert torch.equal(clone(x), model(x))
