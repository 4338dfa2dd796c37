"""Exported graphs: what is in them, and that failures leave nothing behind."""

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

import lq
from lq.export import passes
from lq.export.plan import read_plan
from lq.export.to_onnx import trace
from lq.tensor_spec import RANGES


class Net(nn.Module):
    """Conv-BN-ReLU, a grouped and a transposed convolution, a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.bn3 = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        x = torch.relu(self.bn2(self.grouped(x)))
        x = torch.relu(self.bn3(self.up(x)))
        return self.fc(x.mean((2, 3)))


def net(recipe: object = "tensorrt_int8") -> tuple[nn.Module, Tensor]:
    """A calibrated net whose BatchNorm has negative and zero gammas."""
    torch.manual_seed(0)
    model, x = Net(), torch.randn(4, 3, 12, 12)
    for norm in (model.bn, model.bn2, model.bn3):
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data[1] = -norm.weight.data[1].abs()
        norm.weight.data[2] = 0
    lq.quantize(model, recipe)
    lq.calibrate(model, [x], progress=False)
    return model.eval(), x


def run(graph: ir.Model, x: Tensor) -> Tensor:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def node(graph: ir.Model, name: str) -> ir.Node:
    return next(n for n in graph.graph if n.name == name)


def weight_of(graph: ir.Model, layer: str) -> tuple[np.ndarray, np.ndarray]:
    dequantize = node(graph, layer).inputs[1].producer()
    assert dequantize.op_type == "DequantizeLinear"
    return passes.constant(dequantize.inputs[0]), passes.constant(dequantize.inputs[1])


def test_graph_computes_the_model() -> None:
    model, x = net()
    graph = trace(model, x)
    with torch.no_grad():
        expected = model(x)
    # The only freedom is a rounding tie: one step of the last layer's input scale.
    step = float(model.fc.input_quantizer.scale) * float(
        model.fc.weight.detach().abs().sum(1).max()
    )
    assert (run(graph, x) - expected).abs().max() <= step


def test_batchnorm_is_folded_exactly() -> None:
    model, x = net()
    graph = trace(model, x)
    assert "BatchNormalization" not in {n.op_type for n in graph.graph}
    cases = (("conv", model.bn, 0), ("grouped", model.bn2, 0), ("up", model.bn3, 1))
    for layer, norm, axis in cases:
        float_layer = getattr(model, layer)
        codes, scale = weight_of(graph, layer)
        factor = norm.weight / (norm.running_var + norm.eps).sqrt()
        along = [-1 if i == axis else 1 for i in range(4)]
        before = float_layer.weight_quantizer.scale
        integers = (float_layer.weight / before.view(along)).round().clamp(-127, 127)
        expected = integers * factor.sign().view(along)
        assert np.array_equal(codes, expected.detach().numpy())
        assert codes.dtype == np.int8
        assert (scale > 0).all()
        nonzero = factor != 0
        np.testing.assert_allclose(
            scale[nonzero], (before * factor.abs())[nonzero].detach(), rtol=1e-6
        )
        assert (codes.take(2, axis) == 0).all()


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(nn.Conv2d(8, 12, 3, stride=2, padding=1), id="conv"),
        pytest.param(nn.Conv2d(8, 12, 3, groups=4, bias=False), id="grouped"),
        pytest.param(nn.Conv2d(8, 8, 3, groups=8), id="depthwise"),
        pytest.param(nn.ConvTranspose2d(8, 12, 3, stride=2), id="transposed"),
        pytest.param(nn.ConvTranspose2d(8, 12, 2, stride=2, groups=4), id="transposed, grouped"),
    ],
)
def test_folded_layers_match_a_float_reference(layer: nn.Module) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(layer.out_channels)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    norm.weight.data.normal_()
    norm.weight.data[:2] = torch.tensor([-1.5, 0.0])
    model, x = nn.Sequential(layer, norm), torch.randn(2, 8, 7, 7)
    reference = copy.deepcopy(model).eval().double()
    lq.calibrate(lq.quantize(model, "weight_only_int8"), [x], progress=False)
    reference[0].weight.data = model[0].weight_quantizer(model[0].weight).detach().double()
    with torch.no_grad():
        expected = reference(x.double())
    np.testing.assert_allclose(run(trace(model.eval(), x), x), expected, rtol=1e-4, atol=1e-5)


def test_weights_are_integers_and_small(tmp_path: object) -> None:
    model, x = net()
    graph = trace(model, x)
    floats = [
        v for v in graph.graph.initializers.values() if v.dtype == ir.DataType.FLOAT and v.shape
    ]
    assert max(len(v.shape) for v in floats) == 1  # scales, biases; no float weight is left


@pytest.mark.parametrize("compute", [prune.l1_unstructured, weight_norm], ids=["mask", "norm"])
def test_computed_weights_are_integers_too(compute: Callable[..., object]) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(32, 32, 3), torch.randn(2, 32, 7, 7)  # so large that no exporter folds it
    compute(conv, "weight", **({"amount": 0.5} if compute is prune.l1_unstructured else {}))
    model = lq.quantize(nn.Sequential(conv, nn.BatchNorm2d(32)), "tensorrt_int8")
    lq.calibrate(model, [x], progress=False)
    graph = trace(model.eval(), x)
    codes, _ = weight_of(graph, "0")
    scale = conv.weight_quantizer.scale.view(-1, 1, 1, 1)
    assert np.array_equal(codes, (conv.weight / scale).round().clamp(-127, 127).detach())
    assert {n.op_type for n in graph.graph} == {"QuantizeLinear", "DequantizeLinear", "Conv"}


def test_names_are_those_of_modules() -> None:
    graph = trace(*net())
    names = {n.name for n in graph.graph}
    assert {"conv", "grouped", "up", "fc", "conv.input_quantizer"} <= names
    assert len(names) == len(list(graph.graph))
    assert [v.name for v in graph.graph.outputs] == ["output"]
    assert "conv.weight.int8" in graph.graph.initializers


def test_plan_reads_back() -> None:
    rules = [
        {"name": "conv", "format": "fp16"},
        {"name": "up", "format": "skip"},
        {"name": "fc", "inputs": "fp32"},
    ]
    model, x = net({"rules": rules})
    assert read_plan(trace(model, x)) == {
        "conv": "fp16",
        "grouped": "int8",
        "up": "fp32",
        "fc": "int8/fp32",
    }


@pytest.mark.parametrize(("fmt", "opset"), [("fp16", 18), ("bf16", 22)], ids=["fp16", "bf16"])
def test_16_bit_layers_are_casts(fmt: str, opset: int, tmp_path) -> None:
    model, x = net({"rules": [{"name": "grouped", "format": fmt}]})
    report = lq.export_onnx(model, x, tmp_path / "m.onnx")
    assert report.passed
    assert "16-bit layers rounded" in report.summary()
    graph = ir.load(tmp_path / "m.onnx")
    assert graph.opset_imports[""] == opset
    conv = node(graph, "grouped")
    assert conv.inputs[0].producer().op_type == "Cast"
    assert conv.inputs[1].is_initializer()
    expected = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[fmt]
    assert conv.inputs[1].dtype == expected


@pytest.mark.parametrize("kind", RANGES)
def test_batch_is_dynamic_and_file_valid(kind: str, tmp_path) -> None:
    spec = {"format": "int8", "range": kind}
    model, x = net({"weights": spec, "inputs": spec})
    path = tmp_path / "m.onnx"
    lq.export_onnx(model, x[:1], path)
    onnx.checker.check_model(str(path), full_check=True)
    session = ort.InferenceSession(str(path))
    for batch in (1, 3, 7):
        images = np.zeros((batch, 3, 12, 12), np.float32)
        assert session.run(None, {session.get_inputs()[0].name: images})[0].shape == (batch, 5)


def test_model_is_left_as_it_was(tmp_path) -> None:
    model, x = net()
    model.train()
    model.bn.eval()
    training = {n: m.training for n, m in model.named_modules()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.conv.input_quantizer.mode = lq.Mode.BYPASS
    lq.export_onnx(model, x, tmp_path / "m.onnx")
    assert {n: m.training for n, m in model.named_modules()} == training
    assert model.conv.input_quantizer.mode is lq.Mode.BYPASS
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_float_model_exports(tmp_path) -> None:
    model = Net().eval()
    assert lq.export_onnx(model, torch.randn(2, 3, 12, 12), tmp_path / "m.onnx").sqnr_db > 80


def test_keyword_batches(tmp_path) -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.fc(left) + right

    batch = {"left": torch.randn(2, 4), "right": torch.randn(2, 3), "labels": torch.zeros(2)}
    model = lq.calibrate(lq.quantize(TwoInputs(), "tensorrt_int8"), [batch], progress=False)
    assert lq.export_onnx(model, batch, tmp_path / "m.onnx").passed


def test_layer_used_twice(tmp_path) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    x = torch.randn(8, 16)
    model = lq.calibrate(lq.quantize(Twice(), "tensorrt_int8"), [x], progress=False)
    report = lq.export_onnx(model, x, tmp_path / "m.onnx")
    assert report.passed
    assert {n.name for n in trace(model, x).graph if n.op_type == "Gemm"} == {"fc", "fc@1"}


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        pytest.param({"recipe": {"inputs": "int4"}}, ValueError, "'conv'.*int4", id="int4"),
        pytest.param({"target": "tensorflow"}, ValueError, "tensorflow", id="unknown target"),
        pytest.param({"channels": 1}, RuntimeError, "channels", id="wrong channels"),
        pytest.param({"uncalibrated": True}, RuntimeError, "conv.*not calibrated", id="uncalib."),
        pytest.param({"half": True}, ValueError, "float32", id="half model"),
    ],
)
def test_a_failed_export_leaves_no_file(change: dict, error: type, match: str, tmp_path) -> None:
    model, x = net(change.get("recipe", "tensorrt_int8"))
    if change.get("uncalibrated"):
        model.conv.input_quantizer.reset_parameters()
    if change.get("half"):
        model.half()
    if "channels" in change:
        x = x[:, :1]
    with pytest.raises(error, match=match):
        lq.export_onnx(model, x, tmp_path / "m.onnx", target=change.get("target", "tensorrt"))
    assert list(tmp_path.iterdir()) == []


def test_a_disagreeing_export_leaves_no_file(tmp_path, monkeypatch) -> None:
    model, x = net()

    def wrong(graph: ir.Graph) -> None:
        value = graph.initializers["grouped.weight.int8"]
        value.const_value = ir.tensor(-value.const_value.numpy(), name=value.name)

    original = passes.name_after_modules
    monkeypatch.setattr(passes, "name_after_modules", lambda g: (original(g), wrong(g)))
    with pytest.raises(RuntimeError, match=r"first diverging layer 'grouped'"):
        lq.export_onnx(model, x, tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_norm_that_holds_its_activation(tmp_path: Path) -> None:
    from timm.layers import BatchNormAct2d

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), BatchNormAct2d(16), nn.Conv2d(16, 4, 1)).eval()
    x = torch.randn(2, 3, 8, 8)
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)

    report = lq.export_onnx(model, x, tmp_path / "m.onnx")

    assert report.first_divergence is None
    kinds = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert "BatchNormalization" not in kinds


def test_products_of_a_module_with_layers_are_not_its_output(tmp_path: Path) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            return self.out((q @ k.transpose(1, 2)).softmax(-1) @ v)

    torch.manual_seed(0)
    model, x = nn.Sequential(Attention()).eval(), torch.randn(2, 5, 16)
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)

    report = lq.export_onnx(model, x, tmp_path / "m.onnx")

    assert report.first_divergence is None
    assert {"0.qkv", "0.out"} <= {layer.layer for layer in report.layers}
    assert "0" not in {layer.layer for layer in report.layers}
