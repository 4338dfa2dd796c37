"""Parity finds what is wrong, and nothing where nothing is."""

import copy

import onnx
import pytest
import torch
import torchvision
from onnx import numpy_helper
from torch import nn

import lq
from lq.layer_parity import _ties
from lq.modes import eval_mode
from lq.parity import compare


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
    batches = [(torch.randn(4, 3, 48, 48), torch.zeros(4)) for _ in range(2)]
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), batches, progress=False)
    path = tmp_path_factory.mktemp("parity") / "m.onnx"
    lq.export_onnx(model, batches[0], path, batches=batches)
    return model, path, batches


def tampered(path, name: str, change):
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    changed = path.with_name(f"{name}.onnx")
    onnx.save(model, changed)
    return changed


def test_agrees(exported) -> None:
    model, path, batches = exported
    report = lq.parity(model, path, batches)
    assert report.n == 8
    assert report.first_divergence is None
    assert report.max_code_difference <= 1
    assert report.confident_agreement == 1.0
    # 21 layers; three pairs of them share the quantizer of their input, and three shortcuts have
    # one of their own.
    quantizers = [part for part in report.layers if part.total]
    layers = [part for part in report.layers if not part.total]
    assert (len(quantizers), len(layers)) == (18 + 3, 21)
    assert min(layer.sqnr_db for layer in layers) > 80
    assert sum(layer.differing for layer in report.layers) < 1e-4 * sum(
        layer.total for layer in report.layers
    )


def test_size_is_that_of_integers(exported) -> None:
    model, path, _ = exported
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert path.stat().st_size < 0.26 * weights


@pytest.mark.parametrize(
    ("tensor", "change", "layer"),
    [
        pytest.param("layer2.0.conv2.weight.int8", lambda w: -w, "layer2.0.conv2", id="weight"),
        pytest.param("layer3.1.conv1.bias.folded", lambda b: b + 1, "layer3.1.conv1", id="bias"),
        pytest.param("conv1.weight.scale", lambda s: s * 1.2, "conv1", id="scale"),
        pytest.param("fc.weight.int8", lambda w: (w * 0.9).astype(w.dtype), "fc", id="last layer"),
        pytest.param(
            "layer1.1.conv2.input_quantizer.scale",
            lambda s: (s * 1.05).astype(s.dtype),
            "layer1.1.conv2.input_quantizer",
            id="input scale",
        ),
    ],
)
def test_names_the_first_diverging_layer(exported, tensor, change, layer) -> None:
    model, path, batches = exported
    changed = tampered(path, tensor, change)
    with pytest.raises(RuntimeError, match=f"first diverging layer '{layer}'"):
        lq.parity(model, changed, batches)
    report = compare(model, changed, batches)
    # The layers are fed the same codes, so the error goes no further than a float shortcut does.
    assert len([part for part in report.layers if part.diverges]) <= 8


def test_the_optimized_session_is_measured_by_itself(exported) -> None:
    model, path, batches = exported
    optimized = lq.parity(model, path, batches).optimized
    assert optimized.engine == "ONNX Runtime CPU, optimized"
    assert optimized.passed
    assert optimized.sqnr_db >= optimized.min_sqnr_db == 10
    with eval_mode(model):
        expected = torch.cat([model(x) for x, _ in batches])
    got = torch.cat([lq.open_engine(path).run(x)[0] for x, _ in batches])
    assert optimized.max_difference == pytest.approx(float((expected - got).abs().max()))
    assert optimized.top1_agreement == float((expected.argmax(1) == got.argmax(1)).float().mean())


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_is_compared_end_to_end(exported, engine) -> None:
    pytest.importorskip(engine)
    model, path, batches = exported
    report = lq.parity(model, path, batches, engine=engine)
    assert report.sqnr_db > 10
    assert report.layers == []
    changed = tampered(path, "fc.weight.int8", lambda w: -w)
    with pytest.raises(RuntimeError, match=r"fc\.weight\.int8\.onnx' differs"):
        lq.parity(model, changed, batches, engine=engine)
    runner = lq.open_engine(changed, engine)
    with pytest.raises(RuntimeError, match=f"{runner.name} differs"):
        lq.parity(model, runner, batches)


def test_other_outputs_than_the_models(exported) -> None:
    _, path, batches = exported
    with pytest.raises(RuntimeError, match=r"\[\[4, 3, 48, 48\]\].*\[\[4, 10\]\]"):
        lq.parity(nn.Identity(), path, batches, engine="onnxruntime")


def test_no_batches(exported) -> None:
    model, path, _ = exported
    with pytest.raises(ValueError, match="at least one sample"):
        lq.parity(model, path, [])


def exported_model(model: nn.Module, x: torch.Tensor, path, recipe: object = "tensorrt_int8"):
    lq.calibrate(lq.quantize(model, recipe), [x], progress=False)
    return lq.export_onnx(model, x, path)


@pytest.mark.parametrize(
    "recipe", ["weight_only_int8", {"fallback": "fp16"}], ids=["weights", "16"]
)
def test_float_layers_are_compared_too(tmp_path, recipe) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(4)))
    x, path = torch.randn(16, 8), tmp_path / "m.onnx"
    exported_model(model, x, path, recipe)
    stored = "1.0.weight.int8" if recipe == "weight_only_int8" else "1.0.weight.float16"
    changed = tampered(path, stored, lambda w: (w * 0.9).astype(w.dtype))
    with pytest.raises(RuntimeError, match=r"first diverging layer '1\.0'"):
        lq.parity(model, changed, [x])


class SharedThrice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.pre = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) + 2 * self.fc(x) + self.fc(self.pre(x))


class InPlaceAdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        y = self.b(h)
        h += y
        return h


class OneNumber(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x)[:, 0]


class ReturnsBeforeNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4)
        nn.init.uniform_(self.norm.weight)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.conv(x[:, None])
        return h, self.norm(h)


class ReturnsDict(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.aux = nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, x: torch.Tensor) -> dict[str, object]:
        return {"out": self.fc(x), "aux": [self.aux(x), x.sum()], "at": self.fc(x).argmax(1)}


@pytest.mark.parametrize(
    "make", [SharedThrice, InPlaceAdd, OneNumber, ReturnsBeforeNorm, ReturnsDict]
)
def test_right_exports_pass(tmp_path, make) -> None:
    torch.manual_seed(0)
    assert exported_model(make(), torch.randn(8, 16), tmp_path / "m.onnx").passed


def test_the_branch_of_an_add_is_named(tmp_path) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.a(x) + self.b(x))

    torch.manual_seed(0)
    model, x, path = Branches(), torch.randn(8, 16), tmp_path / "m.onnx"
    exported_model(model, x, path)
    with pytest.raises(RuntimeError, match="first diverging layer 'b'"):
        lq.parity(model, tampered(path, "b.weight.int8", lambda w: -w), [x])


def test_a_model_that_the_file_is_not_of(exported) -> None:
    model, path, batches = exported
    with pytest.raises(ValueError, match=r"exported from.*'conv1\.input_quantizer'"):
        lq.parity(lq.dequantize(copy.deepcopy(model)), path, batches)


def test_averages_right_between_two_codes_may_be_rounded_either_way(tmp_path, monkeypatch) -> None:
    """Of 64 codes, one average in 64 lies there where both scales are the same."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    model, x = nn.Sequential(*layers, nn.Linear(64, 4)).eval(), torch.randn(64, 1, 8, 8)
    lq.calibrate(lq.quantize(model, "onnxruntime_int8"), [x], progress=False)
    model[4].input_quantizer.scale.fill_(0.0213)
    model[2].input_quantizer.scale.fill_(0.0213)
    path = tmp_path / "m.onnx"
    lq.export_onnx(model, x, path, target="onnxruntime")
    (found,) = [p for p in compare(model, path, [x]).layers if p.layer == "4.input_quantizer"]
    assert (found.max_code_difference, found.differing) == (1, 0)
    monkeypatch.setattr("lq.layer_parity.TIE", -1.0)
    assert compare(model, path, [x]).first_divergence == "4.input_quantizer"


def test_only_values_right_between_two_codes_are_ties() -> None:
    quantizer = lq.Quantizer(lq.QuantSpec())
    quantizer.scale.fill_(0.5)
    steps = torch.tensor([0.5, -1.5, 2.4999, 2.49, 3.0, 7.6])
    assert _ties(quantizer, steps * 0.5).tolist() == [True, True, True, False, False, False]
