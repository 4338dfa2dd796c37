"""Exported graphs of every format: what is stored, that plans read back, and file sizes."""

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torchvision
from torch import Tensor, nn

import lq
from lq.export.engine import build_engine, find_builder
from lq.export.plan import read_plan
from lq.export.to_onnx import trace
from lq.functional import encode

FLOATS = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}


class Branches(nn.Module):
    """Conv-BN, pooling, ReLU6, a concatenation, a transposed convolution with groups, a Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.pool = nn.MaxPool2d(2)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.d = nn.Conv2d(32, 16, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2, groups=4)
        self.bn_up = nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(torch.relu(self.bn(self.a(x))))
        y = nn.functional.relu6(self.b(x))
        z = torch.relu(self.c(y))
        x = torch.relu(self.d(torch.cat([y, z], 1)))
        x = torch.relu(self.bn_up(self.up(x)))
        return self.fc(x.mean((2, 3)))


def branches(recipe: object) -> tuple[Branches, Tensor]:
    torch.manual_seed(0)
    model, x = Branches(), torch.randn(4, 3, 16, 16)
    for norm in (model.bn, model.bn_up):
        nn.init.normal_(norm.weight)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    lq.quantize(model, recipe)
    return lq.calibrate(model, [x], progress=False).eval(), x


def everywhere(fmt: str) -> dict:
    return {"weights": fmt, "inputs": "fp32" if fmt == "int4" else fmt}


@pytest.mark.parametrize("fmt", ["int8", "fp8_e4m3", "fp16", "bf16", "int4"])
def test_every_format_exports_with_parity(fmt: str, tmp_path) -> None:
    model, x = branches(everywhere(fmt))
    report = lq.export_onnx(model, x, tmp_path / "m.onnx")
    assert report.passed
    assert report.max_code_difference <= 1
    plan = read_plan(ir.load(tmp_path / "m.onnx"))
    assert plan == dict.fromkeys(["a", "b", "c", "d", "up", "fc"], plan["a"])
    assert plan["a"] == ("int4/fp32" if fmt == "int4" else fmt)


@pytest.mark.parametrize(("fmt", "opset"), [("fp8_e4m3", 19), ("int4", 21)])
def test_codes_are_those_of_torch(fmt: str, opset: int, tmp_path) -> None:
    model, x = branches(everywhere(fmt))
    lq.export_onnx(model, x, tmp_path / "m.onnx")
    graph = ir.load(tmp_path / "m.onnx")
    assert graph.opset_imports[""] == opset
    quantizer = model.b.weight_quantizer
    expected = encode(
        model.b.weight.detach(), quantizer.scale, quantizer.spec.qmin, quantizer.spec.qmax, 0
    )
    (stored,) = (v for n, v in graph.graph.initializers.items() if n.startswith("b.weight."))
    np.testing.assert_array_equal(stored.const_value.numpy().astype(np.float32), expected)
    bits = {"int4": 4, "fp8_e4m3": 8}[fmt]
    assert stored.const_value.nbytes == model.b.weight.numel() * bits // 8


MIXED = {
    "a": "fp16",
    "b": "fp8_e4m3",
    "c": "bf16",
    "d": "int4/fp32",
    "up": "int8",
    "fc": "fp32",
}


def mixed_recipe() -> dict:
    rules = [{"name": n, "format": f} for n, f in MIXED.items() if n not in ("d", "fc")]
    rules += [{"name": "d", "weights": "int4", "inputs": "fp32"}, {"name": "fc", "format": "skip"}]
    return {"rules": rules}


def test_a_mixed_plan_comes_out_as_planned(tmp_path) -> None:
    model, x = branches(mixed_recipe())
    lq.export_onnx(model, x, tmp_path / "m.onnx")
    assert read_plan(ir.load(tmp_path / "m.onnx")) == MIXED


@pytest.mark.parametrize("fmt", ["int8", "fp8_e4m3", "fp16", "bf16", "int4", "mixed"])
def test_tensorrt_builds_what_was_planned(fmt: str, tmp_path) -> None:
    trt = find_builder()
    if trt is None or trt.__name__ != "tensorrt_rtx":
        pytest.skip("needs tensorrt_rtx, which builds without a GPU")
    recipe, same = everywhere(fmt), "int4/fp32" if fmt == "int4" else fmt
    planned = dict.fromkeys(MIXED, same)
    if fmt == "mixed":
        recipe, planned = mixed_recipe(), MIXED
    if fmt == "bf16":  # TensorRT-RTX 1.7 has no bf16 transposed convolution
        recipe["rules"], planned["up"] = [{"name": "up", "format": "fp16"}], "fp16"
    model, x = branches(recipe)
    ir.save(trace(model, x), tmp_path / "m.onnx")
    assert build_engine(tmp_path / "m.onnx", tmp_path / "m.engine").formats == planned


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_neighbouring_16_bit_layers_have_no_float32_between(fmt: str) -> None:
    model, x = branches(everywhere(fmt))
    nodes = list(trace(model, x).graph)
    first, last = (next(i for i, n in enumerate(nodes) if n.name == name) for name in ("a", "up"))
    between = nodes[first : last + 1]  # behind it torch averages in float32
    assert "Cast" not in {n.op_type for n in between}
    assert {"BatchNormalization", "Relu", "MaxPool", "Clip", "Concat"} < {
        n.op_type for n in between
    }
    assert {n.outputs[0].dtype for n in between} == {FLOATS[fmt]}


def test_int8_pairs_stand_behind_activations_and_once_per_tensor() -> None:
    model, x = branches("tensorrt_int8")
    graph = trace(model, x).graph
    quantize = [n for n in graph if n.op_type == "QuantizeLinear"]
    sources = [n.inputs[0].producer() for n in quantize]
    assert [s.op_type if s else None for s in sources] == [
        None,
        "Relu",  # before the pooling
        "Clip",
        "Relu",
        "Relu",
        "ReduceMean",
    ]
    assert "Identity" not in {n.op_type for n in graph}


def test_grouped_transposed_convolution_matches_torch(tmp_path) -> None:
    model, x = branches("tensorrt_int8")
    report = lq.export_onnx(model, x, tmp_path / "m.onnx")
    figures = {layer.layer: layer for layer in report.layers}
    assert figures["up"].sqnr_db > 100


def test_image_size_may_vary(tmp_path) -> None:
    model, x = branches("tensorrt_int8")
    path = tmp_path / "m.onnx"
    lq.export_onnx(model, x, path, dynamic_image=True)
    session = ort.InferenceSession(str(path))
    for shape in ((1, 3, 16, 16), (2, 3, 20, 32)):
        images = torch.randn(shape)
        (output,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
        with torch.no_grad():
            expected = model(images)
        assert lq.functional.sqnr_db(expected, torch.from_numpy(output)) > 15


def test_a_model_that_fixes_its_image_size_says_so(tmp_path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 14 * 14, 2))
    x = torch.randn(2, 3, 16, 16)
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
    with pytest.raises(ValueError, match=r"any size.*dynamic_image=False"):
        lq.export_onnx(model, x, tmp_path / "m.onnx", dynamic_image=True)
    assert list(tmp_path.iterdir()) == []


def test_resnet18_is_a_quarter_of_its_float_file(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = torchvision.models.resnet18().eval(), torch.randn(2, 3, 64, 64)
    ir.save(trace(model, x), tmp_path / "float.onnx")
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
    ir.save(trace(model.eval(), x), tmp_path / "int8.onnx")
    sizes = {name: (tmp_path / f"{name}.onnx").stat().st_size for name in ("float", "int8")}
    assert sizes["int8"] <= 0.26 * sizes["float"]


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        pytest.param({"weights": "int4", "inputs": "int8"}, "'a'.*int4.*int8", id="int4 by int8"),
        pytest.param({"weights": "int8", "inputs": "fp8_e4m3"}, "'a'.*fp8", id="int8 by fp8"),
        pytest.param({"weights": "int4", "inputs": "int4"}, "'a'.*alone", id="int4 by int4"),
        pytest.param({"weights": "int5", "inputs": "fp32"}, "'a'.*int5", id="int5"),
    ],
)
def test_what_no_engine_multiplies_is_refused(recipe: dict, match: str, tmp_path) -> None:
    model, x = branches(recipe)
    with pytest.raises(ValueError, match=match):
        lq.export_onnx(model, x, tmp_path / "m.onnx")


class Shortcut(nn.Module):
    """A convolution and its input, added."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


def with_addition_in(fmt: str) -> tuple[nn.Module, Tensor]:
    """Return a model whose residual addition alone has a format."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Shortcut()), torch.randn(2, 3, 8, 8)
    lq.quantize(model, {"rules": [{"name": "2", "format": fmt}]})
    return lq.calibrate(model, [x], progress=False).eval(), x


def test_an_addition_in_another_format_exports(tmp_path) -> None:
    model, x = with_addition_in("fp8_e4m3")
    assert lq.export_onnx(model, x, tmp_path / "m.onnx").passed
    assert ir.load(tmp_path / "m.onnx").opset_imports[""] == 19


@pytest.mark.parametrize(
    ("fmt", "target"),
    [("int4", "tensorrt"), ("int5", "tensorrt"), ("fp8_e4m3", "openvino")],
)
def test_an_addition_that_a_target_cannot_run_is_refused(fmt: str, target: str, tmp_path) -> None:
    model, x = with_addition_in(fmt)
    with pytest.raises(ValueError, match=rf"{target} .*'2.x_quantizer'.*{fmt}"):
        lq.export_onnx(model, x, tmp_path / "m.onnx", target=target)


def test_onnxruntime_takes_int4_weights(tmp_path) -> None:
    model, x = branches({"rules": [{"name": "d", "weights": "int4", "inputs": "fp32"}]})
    report = lq.export_onnx(model, x, tmp_path / "m.onnx", target="onnxruntime")
    assert report.fused_passed
    plan = read_plan(ir.load(tmp_path / "m.onnx"))
    assert (plan.pop("d"), set(plan.values())) == ("int4/fp32", {"int8"})


def test_codes_behind_16_bit_layers_have_a_bound_of_their_own(tmp_path) -> None:
    model, x = branches({"rules": [{"name": "c", "format": "fp16"}]})
    layers = {part.layer: part for part in lq.export_onnx(model, x, tmp_path / "m.onnx").layers}
    assert layers["b.input_quantizer"].max_share == 1e-4
    assert layers["d.input_quantizer"].max_share == 1e-2  # of y and c(y)
