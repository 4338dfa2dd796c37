from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import lq
from lq.layers import QuantLayer
from lq.surgery import (
    is_calibrated,
    left_float,
    quantizable_layers,
    quantized_layers,
    quantizers,
)


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn1(self.conv1(x)).relu())


class Net(nn.Module):
    """Convolutions in a nested block, BatchNorm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), Block(8))
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.up(self.backbone(x)).mean((2, 3)))


LAYERS = ["backbone.0", "backbone.1.conv1", "backbone.1.conv2", "up", "fc"]
ROOTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "net": (Net, (4, 3, 9, 9)),
    "linear": (lambda: nn.Linear(3, 2), (4, 3)),
    "conv": (lambda: nn.Conv2d(3, 2, 3), (4, 3, 9, 9)),
    "sequential": (lambda: nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), (4, 3)),
    "module-list": (lambda: nn.Sequential(nn.ModuleList([nn.Linear(3, 2)])[0]), (4, 3)),
}
ALL = pytest.mark.parametrize(
    ("make", "shape"), [pytest.param(*root, id=name) for name, root in ROOTS.items()]
)


def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.randn(4, 3, 9, 9)


def calibrated() -> tuple[Net, Tensor]:
    model, x = net()
    return lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False), x


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything a module carries besides tensors: classes, attribute names, hooks."""
    return {
        name: (type(m), sorted(vars(m)), {k: len(v) for k, v in vars(m).items() if "hooks" in k})
        for name, m in model.named_modules()
    }


def test_layers_by_name() -> None:
    model, _ = net()

    assert list(quantizable_layers(model)[0]) == LAYERS
    lq.quantize(model, "tensorrt_int8")
    assert list(quantized_layers(model)) == LAYERS
    assert list(quantizers(model)) == [
        f"{layer}.{kind}_quantizer" for layer in LAYERS for kind in ("input", "weight")
    ]
    assert all(q.name == name for name, q in quantizers(model).items())


@ALL
def test_in_place_and_every_object_stays(make: Any, shape: Any) -> None:
    model = make()
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    keys = list(model.state_dict())

    assert lq.quantize(model, "tensorrt_int8") is model

    now = dict(model.named_modules())
    assert all(now[name] is module for name, module in modules.items())
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert [n for n, _ in model.named_parameters()] == list(parameters)
    quantized_keys = list(model.state_dict())
    assert [k for k in quantized_keys if k in keys] == keys
    assert all("_quantizer." in k or k == "lq_recipe" for k in set(quantized_keys) - set(keys))


@ALL
def test_quantized_is_near_the_float_model(make: Any, shape: Any) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    expected = model(x)

    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)

    y = model(x)
    assert not torch.equal(y, expected)
    assert (y - expected).norm() < 0.1 * expected.norm()


@ALL
@pytest.mark.parametrize("recipe", ["tensorrt_int8", "int8_fp16_fallback", "weight_only_int8"])
def test_dequantize_leaves_nothing_behind(make: Any, shape: Any, recipe: str) -> None:
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    before, expected, state = anatomy(model), model(x), copy.deepcopy(model.state_dict())
    metadata = model.state_dict()._metadata

    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
    lq.quantize(model, recipe)
    assert lq.dequantize(model) is model

    assert anatomy(model) == before == anatomy(make())
    assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == list(state)
    assert model.state_dict()._metadata == metadata
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert lq.dequantize(model) is model


def test_quantizing_again_changes_nothing() -> None:
    model, x = calibrated()
    expected, modules, before = model(x), list(model.modules()), anatomy(model)
    state = copy.deepcopy(model.state_dict())

    lq.quantize(model, "tensorrt_int8")

    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert anatomy(model) == before
    assert torch.equal(model(x), expected)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_another_recipe_keeps_the_ranges_of_unchanged_layers() -> None:
    model, _ = calibrated()
    scales = {n: q.scale.clone() for n, q in quantizers(model).items()}
    other = {
        "rules": [
            {"name": "fc", "format": "int4"},
            {"name": "up", "format": "skip"},
            {"name": "backbone.0", "format": "fp16"},
        ]
    }

    lq.quantize(model, other)

    assert list(quantized_layers(model)) == [n for n in LAYERS if n != "up"]
    assert type(model.up) is nn.ConvTranspose2d
    assert model.backbone[0].input_quantizer.scale is None
    assert not model.fc.input_quantizer.is_calibrated
    assert not model.fc.weight_quantizer.is_calibrated
    kept = {n: q for n, q in quantizers(model).items() if n.startswith("backbone.1")}
    assert len(kept) == 4
    assert all(torch.equal(q.scale, scales[n]) for n, q in kept.items())


def test_a_layer_once_skipped_comes_back() -> None:
    model, x = calibrated()
    lq.quantize(model, {"rules": [{"name": "fc", "format": "skip"}]})

    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)

    assert torch.equal(model(x), calibrated()[0](x))


@pytest.mark.parametrize("name", ["fp16", "fp32"])
def test_formats_that_change_no_structure(name: str) -> None:
    model, x = net()
    expected = model(x)

    lq.quantize(model, {"weights": name, "inputs": name})

    assert bool(quantized_layers(model)) is (name == "fp16")
    assert is_calibrated(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        pytest.param(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(3)), "Sequential", id="no-layer"),
        pytest.param(nn.Identity(), "Identity", id="leaf"),
        pytest.param(
            nn.MultiheadAttention(8, 2, kdim=4), "out_proj.*MultiheadAttention", id="attention"
        ),
        pytest.param(nn.LazyLinear(3), "lazy", id="lazy"),
    ],
)
def test_nothing_to_quantize(model: nn.Module, message: str) -> None:
    before = anatomy(model)

    with pytest.raises(ValueError, match=f"none in.*{message}"):
        lq.quantize(model, "tensorrt_int8")

    assert anatomy(model) == before


def test_a_wrong_recipe_changes_nothing() -> None:
    model, x = calibrated()
    before, expected = anatomy(model), model(x)

    with pytest.raises(ValueError, match="did you mean 'fc'"):
        lq.quantize(model, {"weights": "int4", "rules": [{"name": "fcc", "format": "fp16"}]})
    with pytest.raises(ValueError, match="one format"):
        lq.quantize(model, {"rules": [{"name": "fc", "weights": "fp16"}]})

    assert anatomy(model) == before
    assert torch.equal(model(x), expected)


def test_per_channel_inputs_in_a_rule_change_nothing() -> None:
    model, _ = net()
    before = anatomy(model)
    rule = lq.Rule(name="fc", inputs=lq.QuantSpec("int8", axis=1))

    with pytest.raises(ValueError, match="axis"):
        lq.quantize(model, lq.Recipe(rules=(rule,)))

    assert anatomy(model) == before


class ReadsWeights(nn.Module):
    """Does without calling its layer, as torchvision's Swin Transformer does."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.read = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.fc(x), self.read.weight)


def test_a_layer_that_is_not_called_is_left_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(ReadsWeights()), torch.randn(2, 8)

    with caplog.at_level(logging.WARNING, "lq.surgery"):
        lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)

    assert list(quantized_layers(model)) == ["0.fc"]
    assert "ReadsWeights reads its weight without calling it" in left_float(model)["0.read"]
    assert "0.read" in caplog.text
    other = lq.quantize(nn.Sequential(ReadsWeights()), "tensorrt_int8")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), model(x))


def test_lazy_layers_are_left_until_they_have_a_weight(caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Sequential(nn.Linear(3, 4), nn.LazyLinear(2)), torch.randn(5, 3)

    with caplog.at_level(logging.WARNING, "lq.surgery"):
        lq.quantize(model, "tensorrt_int8")
    assert list(quantized_layers(model)) == ["0"]
    assert "lazy" in caplog.text

    lq.calibrate(model, [x], progress=False)
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
    assert list(quantized_layers(model)) == ["0", "1"]
    assert model(x).isfinite().all()


def test_quantizing_the_whole_after_a_part() -> None:
    model, x = net()
    lq.quantize(model.backbone, {"weights": "int4"})
    assert "lq_recipe" in model.backbone.state_dict()

    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)

    assert torch.equal(model(x), calibrated()[0](x))
    assert [k for k in model.state_dict() if k.endswith("lq_recipe")] == ["lq_recipe"]
    assert quantizers(model)["backbone.0.input_quantizer"].name == "backbone.0.input_quantizer"
    lq.dequantize(model)
    assert anatomy(model) == anatomy(Net())


def test_quantizing_a_part_after_the_whole_restores() -> None:
    model, x = calibrated()
    lq.calibrate(lq.quantize(model.backbone, {"weights": "int4"}), [x], progress=False)
    expected, state = model(x), copy.deepcopy(model.state_dict())

    model.load_state_dict(state)

    assert torch.equal(model(x), expected)


def test_quantizing_only_a_part() -> None:
    model, x = net()

    lq.calibrate(lq.quantize(model.backbone, "tensorrt_int8"), [x], progress=False)

    assert list(quantized_layers(model)) == LAYERS[:3]
    assert type(model.fc) is nn.Linear
    assert model(x).isfinite().all()
    lq.dequantize(model)
    assert anatomy(model) == anatomy(Net())


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: AveragedModel(m).module],
    ids=["deepcopy", "pickle", "AveragedModel"],
)
def test_copies_are_whole_and_independent(clone: Callable[[nn.Module], nn.Module]) -> None:
    model, x = calibrated()
    expected = model(x)

    other = clone(model)

    assert torch.equal(other(x), expected)
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}
    assert list(other.state_dict()) == list(model.state_dict())
    float_state = {k: v for k, v in Net().state_dict().items()}
    other.load_state_dict(float_state)
    assert not is_calibrated(other)
    assert is_calibrated(model)
    lq.dequantize(other)
    assert anatomy(other) == anatomy(Net())
    assert "lq_recipe" in model.state_dict(), "the original keeps its hooks"
    assert torch.equal(model(x), expected)


def test_device_and_type_of_the_quantizers_follow_the_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 4, device="meta", dtype=torch.float16))

    lq.quantize(model, "tensorrt_int8")

    assert all(q.scale.is_meta for q in quantizers(model).values())
    assert all(q.scale.dtype is torch.float32 for q in quantizers(model).values())


def test_training_flags_and_gradients_flags_stay() -> None:
    model, _ = net()
    model.train()
    model.backbone.eval()
    model.fc.weight.requires_grad_(False)
    before = {n: m.training for n, m in model.named_modules()}

    lq.quantize(model, "tensorrt_int8")

    assert {n: m.training for n, m in model.named_modules() if n in before} == before
    assert not model.fc.weight.requires_grad
    assert model.up.weight.requires_grad


def test_is_calibrated() -> None:
    model, _ = net()
    assert is_calibrated(model)

    lq.quantize(model, "tensorrt_int8")
    assert not is_calibrated(model)
    model.fc.input_quantizer.amax = 1.0
    assert is_calibrated(model)


def test_repr_reads_as_a_report() -> None:
    model = lq.quantize(nn.Sequential(nn.Linear(3, 4)), "weight_only_int8")

    assert repr(model) == (
        "Sequential(\n"
        "  (0): QuantLinear(\n"
        "    in_features=3, out_features=4, bias=True\n"
        "    (input_quantizer): Quantizer(fp32)\n"
        "    (weight_quantizer): Quantizer(int8, axis=0, uncalibrated)\n"
        "  )\n"
        ")"
    )
    assert isinstance(model[0], QuantLayer)
