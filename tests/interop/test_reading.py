"""Reading Q/DQ graphs of other toolkits: formats and ranges, beside what those toolkits say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper, parser
from torch import Tensor, nn

import lq
from lq.export.to_onnx import trace
from lq.interop import read_onnx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.up(torch.relu(self.conv(x))))
        return self.fc(x.mean((2, 3)))


@pytest.fixture
def net() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.randn(8, 3, 8, 8)


@pytest.fixture
def float_file(net, tmp_path) -> Path:
    ir.save(trace(*net), tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def data(net) -> list[tuple[Tensor, Tensor]]:
    model, x = net
    return [(x, model(x).argmax(1))]


def quantized_by_onnxruntime(net, source: Path, path: Path, **kwargs: Any) -> Path:
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        batches = iter([{"x": net[1].numpy()}])

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    q.quantize_static(source, path, Reader(), quant_format=q.QuantFormat.QDQ, **kwargs)
    return path


def initializers(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path).graph
    return {i.name: numpy_helper.to_array(i) for i in graph.initializer}


def types(activation: str, weight: str) -> dict[str, Any]:
    from onnxruntime.quantization import QuantType

    return {"activation_type": QuantType[activation], "weight_type": QuantType[weight]}


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize(
    ("activation", "weight", "plan"),
    [
        ("QUInt8", "QInt8", "int8"),
        ("QInt8", "QInt8", "int8"),
        ("QUInt8", "QUInt8", "int8"),
        ("QUInt16", "QInt8", "int8/uint16"),
        ("QInt16", "QInt16", "int16"),
    ],
)
def test_onnxruntime(net, float_file, tmp_path, per_channel, activation, weight, plan) -> None:
    kwargs = types(activation, weight)
    path = quantized_by_onnxruntime(
        net, float_file, tmp_path / "q.onnx", per_channel=per_channel, **kwargs
    )
    graph = read_onnx(path)
    assert graph.plan == dict.fromkeys(("conv", "up", "fc"), plan)
    assert graph.integer_operators == {}
    stored = initializers(path)
    for layer in graph.layers.values():
        found = graph.ranges[layer.input]
        assert found.format == activation.removeprefix("Q").lower()
        np.testing.assert_array_equal(found.scale, stored[f"{layer.input}_scale"])
        np.testing.assert_array_equal(found.zero_point, stored[f"{layer.input}_zero_point"])
        weights = graph.ranges[layer.weight]
        assert weights.format == weight.removeprefix("Q").lower()
        assert weights.stored == "codes"
        assert (weights.axis is not None) is per_channel
    # The range of the input is that of the data: onnxruntime.quantization calibrates by min-max.
    x = net[1]
    step = graph.ranges["x"].scale
    assert abs(graph.ranges["x"].low - x.min().item()) <= step
    assert abs(graph.ranges["x"].high - x.max().item()) <= step
    # Weights are what the codes stand for, to half a step.
    layer = next(v for v in graph.layers.values() if v.module == "conv")
    found, codes = graph.ranges[layer.weight], stored[layer.weight]
    shape = (-1, 1, 1, 1) if per_channel else ()
    values = (codes.astype(np.float32) - found.zero_point.reshape(shape)) * found.scale.reshape(
        shape
    )
    error = np.abs(values - net[0].conv.weight.detach().numpy())
    assert (error <= found.scale.reshape(shape) * 0.51).all()
    assert layer.parameters == 16 * 3 * 9
    assert layer.bytes == codes.nbytes


@pytest.mark.parametrize("contributed", [False, True])
def test_sixteen_bits_of_onnx_and_of_microsoft(net, float_file, tmp_path, contributed) -> None:
    kwargs = types("QUInt16", "QInt8")
    options = {"UseQDQContribOps": contributed}
    path = quantized_by_onnxruntime(
        net, float_file, tmp_path / "q.onnx", extra_options=options, **kwargs
    )
    domains = {n.domain for n in onnx.load(path).graph.node if n.op_type == "QuantizeLinear"}
    assert domains == ({"com.microsoft"} if contributed else {""})
    assert read_onnx(path).ranges["x"].format == "uint16"
    assert lq.evaluate(path, data(net), progress=False).top1 >= 0.75
    assert "format" not in {f.rule for f in lq.lint(path, "onnxruntime")}
    assert "format" in {f.rule for f in lq.lint(path, "tensorrt")}


def test_evaluate_and_lint_take_them(net, float_file, tmp_path) -> None:
    path = quantized_by_onnxruntime(net, float_file, tmp_path / "q.onnx")
    result = lq.evaluate(path, data(net), progress=False)
    assert result.n == 8
    assert result.top1 >= 0.75
    assert {f.rule for f in lq.lint(path, "tensorrt")} >= {"zero-point", "quantized-bias"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("opset", [13, 17])
def test_modelopt(net, tmp_path, opset) -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    model, x = net
    expected = data(net)
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda m: m(x))
    path = tmp_path / "modelopt.onnx"
    export = {"dynamo": False, "input_names": ["x"], "dynamic_axes": {"x": {0: "n"}}}
    torch.onnx.export(model, (x,), path, opset_version=opset, **export)
    graph = read_onnx(path)
    assert graph.plan == dict.fromkeys(("conv", "up", "fc"), "int8")
    for layer in graph.layers.values():
        module = model.get_submodule(layer.module)
        for name, quantizer in (
            (layer.input, module.input_quantizer),
            (layer.weight, module.weight_quantizer),
        ):
            found = graph.ranges[name]
            assert found.is_symmetric
            np.testing.assert_allclose(found.amax, quantizer.amax.flatten().squeeze(), rtol=1e-6)
        assert graph.ranges[layer.weight].stored == "floats"
    assert graph.ranges[graph.layers["/up/ConvTranspose"].weight].axis is not None
    assert lq.evaluate(path, expected, progress=False).n == 8
    assert "float-weights" in {f.rule for f in lq.lint(path)}


@pytest.mark.filterwarnings("ignore")
def test_modelopt_float8(net, tmp_path) -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    model, x = net
    model.up = nn.Upsample(scale_factor=2)
    model.fc = nn.Linear(16, 5)
    mtq.quantize(model, mtq.FP8_DEFAULT_CFG, lambda m: m(x))
    path = tmp_path / "fp8.onnx"
    torch.onnx.export(model, (x,), path, dynamo=False, opset_version=19)
    assert {n.domain for n in onnx.load(path).graph.node} == {"", "trt"}
    graph = read_onnx(path)
    assert graph.plan == {"conv": "fp8_e4m3", "fc": "fp8_e4m3"}
    for layer in graph.layers.values():
        module = model.get_submodule(layer.module)
        amax = graph.ranges[layer.input].amax, graph.ranges[layer.weight].amax
        theirs = [module.input_quantizer.amax.item(), module.weight_quantizer.amax.item()]
        np.testing.assert_allclose(amax, theirs, rtol=1e-6)
    assert {f.rule for f in lq.lint(path)} >= {"float-weights"}


@pytest.mark.filterwarnings("ignore")
def test_nncf(net, float_file, tmp_path) -> None:
    nncf = pytest.importorskip("nncf")
    dataset = nncf.Dataset([{"x": net[1].numpy()}])
    path = tmp_path / "nncf.onnx"
    onnx.save(nncf.quantize(onnx.load(float_file), dataset), path)
    graph = read_onnx(path)
    assert set(graph.plan.values()) == {"int8"}
    assert set(graph.plan) == {"conv", "up", "fc"}
    assert abs(graph.ranges["x"].amax - net[1].abs().max().item()) < 0.3
    assert lq.evaluate(path, data(net), progress=False).n == 8
    assert lq.lint(path, "openvino") == []


def test_our_own(net, tmp_path) -> None:
    model, x = net
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
    lq.export_onnx(model, x, tmp_path / "m.onnx")
    graph = read_onnx(tmp_path / "m.onnx")
    assert graph.plan == dict(lq.PrecisionPlan.of(tmp_path / "m.onnx"))
    for name, layer in graph.layers.items():
        module = model.get_submodule(name)
        for key, quantizer in (
            (layer.input, module.input_quantizer),
            (layer.weight, module.weight_quantizer),
        ):
            scale = quantizer.scale.numpy()
            np.testing.assert_array_equal(graph.ranges[key].scale, scale)
            assert graph.ranges[key].amax == pytest.approx(quantizer.amax.numpy(), rel=1e-6)


HEAD = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft": 1]>'


def graph_of(body: str, constants: str) -> onnx.ModelProto:
    return parser.parse_model(
        f"{HEAD} g (float[n, 4] x) => (float[n, 2] y) <{constants}> {{ {body} }}"
    )


def test_zero_point_is_computed_by_a_cast() -> None:
    """As pytorch-quantization writes it: a constant, and a Cast to the type of the codes."""
    graph = read_onnx(
        graph_of(
            """
            z = Cast <to = 3> (zero)
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            wz = Cast <to = 3> (zeros)
            wq = QuantizeLinear <axis = 1> (w, ws, wz)
            wd = DequantizeLinear <axis = 1> (wq, ws, wz)
            y = MatMul (d, wd)
            """,
            """float s = {0.5}, float zero = {0}, float[2] ws = {0.1, 0.2},
            int32[2] zeros = {0, 0}, float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}""",
        )
    )
    assert graph.plan == {"y": "int8"}
    assert graph.ranges["x"].amax == 63.5
    np.testing.assert_allclose(graph.ranges["w"].amax, [12.7, 25.4], rtol=1e-6)
    assert (graph.ranges["w"].axis, graph.ranges["w"].stored) == (1, "floats")


def test_blocks_and_float8() -> None:
    graph = read_onnx(
        graph_of(
            """
            wd = DequantizeLinear <axis = 0, block_size = 2> (w, ws)
            q = QuantizeLinear <output_dtype = 17> (x, s)
            d = DequantizeLinear (q, s)
            y = MatMul (d, wd)
            """,
            """float s = {0.5}, float[2, 2] ws = {0.1, 0.2, 0.3, 0.4},
            int4[4, 2] w = {1, 2, 3, 4, 5, 6, 7, -8}""",
        )
    )
    assert graph.plan == {"y": "int4/fp8_e4m3"}
    weight = graph.ranges["w"]
    assert (weight.format, weight.axis, weight.block) == ("int4", 0, 2)
    np.testing.assert_allclose(weight.amax, [[0.7, 1.4], [2.1, 2.8]], rtol=1e-6)
    assert graph.ranges["x"].amax == 224


def ones(count: int) -> str:
    return ", ".join(["1"] * count)


def test_weights_of_unnamed_nodes_are_apart() -> None:
    layer = "d{i} = DequantizeLinear (w{i}, s)\n h{i} = MatMul ({x}, d{i})\n"
    body = layer.format(i=1, x="x") + layer.format(i=2, x="h1") + "y = Identity (h2)"
    graph = read_onnx(
        graph_of(
            body,
            f"float s = {{0.5}}, int8[4, 4] w1 = {{{ones(16)}}}, uint8[4, 2] w2 = {{{ones(8)}}}",
        )
    )
    assert graph.plan == {"h1": "int8/fp32", "h2": "int8/fp32"}
    assert not graph.ranges["w2"].is_symmetric


def test_integer_operators_are_named(net, float_file, tmp_path) -> None:
    from onnxruntime import quantization as q

    q.quantize_dynamic(float_file, tmp_path / "dynamic.onnx")
    found = read_onnx(tmp_path / "dynamic.onnx").integer_operators
    assert "DynamicQuantizeLinear" in found.values()
    assert {"ConvInteger", "MatMulInteger"} & set(found.values())


def test_no_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="Expected an ONNX file"):
        read_onnx(tmp_path / "none.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="to be an ONNX model"):
        read_onnx(tmp_path / "bad.onnx")


def test_layers_that_quantize_one_tensor_in_two_ways(tmp_path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x)

    recipe = {"rules": [{"name": "b", "format": "fp8_e4m3"}]}
    model = lq.quantize(Two(), recipe)
    x = torch.linspace(-2, 3, 64).view(4, 16)
    lq.calibrate(model, [x], progress=False)
    lq.export_onnx(model, x, tmp_path / "m.onnx")
    graph = lq.interop.read_onnx(tmp_path / "m.onnx")
    for name, format in ("a", "int8"), ("b", "fp8_e4m3"):
        found = graph.ranges[graph.layers[name].input]
        assert (graph.plan[name], found.format) == (format, format)
        assert float(found.amax) == pytest.approx(3.0)
