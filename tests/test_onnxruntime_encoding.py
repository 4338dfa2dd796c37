"""The encoding for ONNX Runtime: the same integers, in kernels that are fast."""

import collections
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torchvision
from torch import nn

import lq
from lq.engines import onnxruntime_runner
from lq.engines.kernels import MAX_BIAS_CODE, encode_biases
from lq.engines.onnxruntime_runner import OnnxRuntimeRunner
from lq.export.onnxruntime_encoding import encode_for_onnxruntime, encode_for_openvino
from lq.export.to_onnx import trace

parity_module = sys.modules["lq.parity"]  # the function of this name hides it


def calibrated(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """A calibrated model whose ranges clip some of what it is given."""
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x * 0.7], progress=False)
    return model.eval()


def activation_net(activation: nn.Module) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), activation, nn.Conv2d(16, 8, 1), activation, nn.Conv2d(8, 4, 1)
    )
    x = torch.randn(4, 3, 12, 12) * 4
    return calibrated(model, x), x


def dequantized(graph: ir.Graph) -> list[ir.Value]:
    """The values that activations are dequantized to, in order, less pairs that repeat another."""
    return [
        node.outputs[0]
        for node in graph
        if node.op_type == "DequantizeLinear"
        and not node.inputs[0].is_initializer()
        and not node.name.endswith("/repeated/DequantizeLinear")
    ]


def run_all(model: ir.Model, x: torch.Tensor) -> list[np.ndarray]:
    """Every dequantized activation, and the outputs, computed node by node."""
    model.graph.outputs.extend(dequantized(model.graph))
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, {session.get_inputs()[0].name: x.numpy()})


@pytest.mark.parametrize(
    ("activation", "zero_point"),
    [
        pytest.param(nn.ReLU(), 0, id="relu"),
        pytest.param(nn.ReLU6(), 0, id="relu6"),
        pytest.param(nn.Hardtanh(-0.5, 1.5), 128, id="hardtanh"),
        pytest.param(nn.Hardtanh(0.2, 1.5), 0, id="above zero"),
        pytest.param(nn.LeakyReLU(), 128, id="leaky"),
    ],
)
def test_dequantized_values_are_the_same_bit_for_bit(activation, zero_point) -> None:
    model, x = activation_net(activation)
    graph = trace(model, x)
    before = run_all(ir.from_proto(ir.to_proto(graph)), x)
    encode_for_onnxruntime(graph.graph)
    points = [n.inputs[2].const_value.numpy() for n in graph.graph if n.op_type == "QuantizeLinear"]
    assert [(p.dtype, int(p)) for p in points] == [
        ("uint8", p) for p in (128, zero_point, zero_point)
    ]
    after = run_all(graph, x)
    assert len(before) == len(after) == 4
    for one, other in zip(before, after, strict=True):
        assert np.array_equal(one, other)
    saturated = max(float(one.max()) for one in before[1:])
    assert saturated < float(x.abs().max())  # or the test would not see other saturation


def test_residual_network_is_the_same_bit_for_bit() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = calibrated(torchvision.models.resnet18(num_classes=10), x)
    graph = trace(model, x)
    before = run_all(ir.from_proto(ir.to_proto(graph)), x)
    encode_for_onnxruntime(graph.graph)
    assert all(map(np.array_equal, before, run_all(graph, x)))


def test_openvino_has_zero_point_0_bit_for_bit() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)
    model = calibrated(torchvision.models.resnet18(num_classes=10), x)
    graph = trace(model, x)
    before = run_all(ir.from_proto(ir.to_proto(graph)), x)
    encode_for_openvino(graph.graph)
    assert all(map(np.array_equal, before, run_all(graph, x)))
    points = [n.inputs[2].const_value.numpy() for n in graph.graph if n.op_type == "QuantizeLinear"]
    assert all(point == 0 for point in points)
    signed = {n.name for n in graph.graph if n.op_type == "QuantizeLinear"} - {
        n.name
        for n in graph.graph
        if n.op_type == "QuantizeLinear" and n.inputs[2].dtype.name == "UINT8"
    }
    assert {"conv1.input_quantizer", "fc.input_quantizer"} <= signed


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()], ids=["relu", "relu6"])
def test_codes_without_sign_need_no_clip(tmp_path, activation, monkeypatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3), activation, nn.Conv2d(16, 16, 3), activation]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)]
    model, x = nn.Sequential(*layers).eval(), torch.randn(4, 3, 12, 12)
    lq.calibrate(lq.quantize(model, "onnxruntime_int8"), [x * 0.7], progress=False)
    graph = trace(model, x)
    before = run_all(ir.from_proto(ir.to_proto(graph)), x)
    encode_for_onnxruntime(graph.graph)
    assert all(map(np.array_equal, before, run_all(graph, x)))
    assert lq.export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime").passed
    ops = optimized_ops(tmp_path, monkeypatch)
    assert (ops["QLinearConv"], ops["QGemm"]) == (2, 1)
    assert ops["Relu"] + ops["Clip"] + ops["Conv"] + ops["FusedConv"] + ops["Gemm"] == 0


def optimized_ops(folder, monkeypatch) -> collections.Counter:
    """What ONNX Runtime makes of m.onnx, as the runner opens it."""
    options, path = onnxruntime_runner._options(True, 1), folder / "optimized.onnx"
    options.optimized_model_filepath = str(path)
    monkeypatch.setattr(onnxruntime_runner, "_options", lambda *_: options)
    OnnxRuntimeRunner(folder / "m.onnx")
    return collections.Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()], ids=["relu", "relu6"])
def test_export_runs_in_integer_kernels(tmp_path, activation, monkeypatch) -> None:
    model, x = activation_net(activation)
    report = lq.export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    assert report.passed
    assert report.optimized.passed
    ops = optimized_ops(tmp_path, monkeypatch)
    assert ops["QLinearConv"] == 2  # all that are quantized again; the last gives floats
    assert ops["Relu"] == 0


def test_biases_are_rounded_to_steps_of_the_accumulator() -> None:
    model, x = activation_net(nn.ReLU())
    graph = trace(model, x)
    assert encode_biases(graph.graph)
    (layer,) = [node for node in graph.graph if node.name == "2"]
    stored = layer.inputs[2].producer()
    codes, step = (value.const_value.numpy() for value in stored.inputs)
    scales = model[2].input_quantizer.scale * model[2].weight_quantizer.scale
    np.testing.assert_array_equal(step, scales.numpy())
    assert codes.dtype == np.int32
    bias = model[2].bias.detach().numpy()
    assert np.abs(codes * step.astype(np.float64) - bias).max() <= 0.5001 * step.max()


def test_a_bias_beyond_int32_widens_its_weight_scale(tmp_path) -> None:
    model, x = activation_net(nn.ReLU())
    with torch.no_grad():
        model[2].weight[3] *= 1e-12  # a dead channel, as real networks have them
        model[2].bias[3] = 1.0
    lq.calibrate(model, [x * 0.7], progress=False)
    graph = trace(model, x)
    assert encode_biases(graph.graph)
    (layer,) = [node for node in graph.graph if node.name == "2"]
    codes = layer.inputs[2].producer().inputs[0].const_value.numpy()
    assert abs(int(codes[3])) == MAX_BIAS_CODE
    report = lq.export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    assert min(layer.sqnr_db for layer in report.layers) > 60
    assert report.optimized.sqnr_db > 30


class SharedInput(nn.Module):
    """A quantized and a float layer read one quantized tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.last = (nn.Conv2d(8, 8, 1) for _ in range(4))
        self.before, self.after = (lq.Quantizer(lq.QuantSpec("int8")) for _ in range(2))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.relu(self.first(x))
        return self.last(self.a(x)), self.after(self.b(self.before(x)))


def test_a_float_layer_does_not_take_the_kernels_from_the_others(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    model, x = SharedInput(), torch.randn(2, 8, 12, 12)
    lq.quantize(model, {"rules": [{"name": "b", "format": "skip"}]})
    lq.calibrate(model, [x], progress=False)
    report = lq.export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    assert report.optimized.sqnr_db > 30
    ops = optimized_ops(tmp_path, monkeypatch)
    assert (ops["QLinearConv"], ops["Conv"] + ops["FusedConv"]) == (2, 2)


def test_pooled_integers_stay_integers(tmp_path, monkeypatch) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), lq.Quantizer(lq.QuantSpec("int8")), nn.MaxPool2d(2)]
    model, x = nn.Sequential(*layers, nn.Conv2d(8, 8, 1), nn.ReLU()), torch.randn(2, 3, 12, 12)
    model.append(lq.Quantizer(lq.QuantSpec("int8")))
    lq.quantize(model, {"rules": [{"name": "4", "inputs": "fp32", "weights": "int8"}]})
    lq.calibrate(model.eval(), [x], progress=False)
    graph = trace(model, x)
    before = run_all(ir.from_proto(ir.to_proto(graph)), x)
    encode_for_onnxruntime(graph.graph)
    assert np.array_equal(before[0], run_all(graph, x)[0])
    assert lq.export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime").passed
    ops = optimized_ops(tmp_path, monkeypatch)
    assert ops["QLinearConv"] == 2
    assert ops["MaxPool"] + ops["Conv"] + ops["FusedConv"] == 0


def test_an_export_whose_fused_session_disagrees_leaves_no_file(tmp_path, monkeypatch) -> None:
    model, x = activation_net(nn.ReLU())
    monkeypatch.setattr(parity_module, "MIN_ENGINE_SQNR_DB", 1e6)
    with pytest.raises(RuntimeError, match="fused"):
        lq.export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    assert list(tmp_path.iterdir()) == []
    assert lq.export_onnx(model, x, tmp_path / "m.onnx", target="tensorrt").passed


def test_openvino_and_16_bit_are_refused_by_name(tmp_path) -> None:
    model, x = activation_net(nn.ReLU())
    lq.quantize(model, {"rules": [{"name": "2", "format": "fp16"}]})
    with pytest.raises(ValueError, match=r"openvino cannot run layer '2'.*fp16"):
        lq.export_onnx(model, x, tmp_path / "m.onnx", target="openvino")
