"""Runners and engine builds: one interface, real builds, clear refusals."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

import lq
from lq.engines import open_engine, tensorrt_runner
from lq.engines.cast_through import cast_through
from lq.engines.onnxruntime_runner import OnnxRuntimeRunner
from lq.export import engine
from lq.files import sha256


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten())
    x = torch.randn(4, 3, 8, 8)
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
    path = tmp_path_factory.mktemp("engines") / "m.onnx"
    lq.export_onnx(model, x, path)
    return model.eval(), x, path


def test_one_interface(exported) -> None:
    model, x, path = exported
    with torch.no_grad():
        expected = model(x)
    for stored in (model, path, str(path)):
        (output,) = open_engine(stored).run(x)
        assert (output - expected).abs().max() <= 1e-4
    runner = open_engine(path)
    assert open_engine(runner) is runner
    assert runner.size_mb == path.stat().st_size / 1e6


def test_torch_runner_leaves_the_model_in_its_mode(exported) -> None:
    model, x, _ = exported
    model.train()
    open_engine(model).run(x)
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        pytest.param(lambda r, x: r.run(x[:, :1]), r"\[\?, 3, 8, 8\].*\[4, 1, 8, 8\]", id="shape"),
        pytest.param(lambda r, x: r.run(x, x), "inputs", id="too many"),
        pytest.param(lambda r, x: r.run(), "inputs", id="none"),
        pytest.param(lambda r, x: r.run(image=x), "inputs", id="name"),
    ],
)
def test_wrong_inputs(exported, call, match) -> None:
    _, x, path = exported
    with pytest.raises(ValueError, match=match):
        call(open_engine(path), x)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("no.onnx", None, FileNotFoundError),
        ("no.engine", None, FileNotFoundError),
        ("bad.onnx", b"not a model", ValueError),
        ("model.tflite", b"", ValueError),
    ],
)
def test_bad_files(tmp_path, name, content, error) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=name):
        open_engine(tmp_path / name)


def float_weight_between_qdq() -> ir.Model:
    """Q -> DQ -> Conv with a float weight -> Q -> DQ, as other exporters write it."""
    rng = np.random.default_rng(0)
    zero = numpy_helper.from_array(np.int8(0), "zero")
    tensors = [
        numpy_helper.from_array(rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "w"),
        numpy_helper.from_array(np.float32(0.05), "s"),
        numpy_helper.from_array(np.float32(0.5), "t"),
        zero,
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "zero"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["c"]),
        helper.make_node("QuantizeLinear", ["c", "t", "zero"], ["e"]),
        helper.make_node("DequantizeLinear", ["e", "t", "zero"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return ir.from_proto(model)


def test_runtime_does_not_quantize_what_the_graph_leaves_float(tmp_path) -> None:
    model = float_weight_between_qdq()
    path = tmp_path / "m.onnx"
    ir.save(model, path)
    x = np.random.default_rng(1).normal(size=(2, 3, 8, 8)).astype(np.float32)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    plain = ort.InferenceSession(path, options).run(None, {"x": x})[0]
    rewritten = ort.InferenceSession(path).run(None, {"x": x})[0]
    assert not np.array_equal(rewritten, plain)  # the default does requantize
    (ours,) = OnnxRuntimeRunner(path).run(torch.from_numpy(x))
    assert np.array_equal(ours.numpy(), plain)


@pytest.mark.parametrize("fmt", ["fp16", "bf16"])
def test_cast_through_rounds_as_the_layer_does(tmp_path, fmt) -> None:
    torch.manual_seed(0)
    model = lq.quantize(nn.Linear(32, 8), {"rules": [{"type": "Linear", "format": fmt}]})
    x = torch.randn(5, 32) * 3
    lq.export_onnx(model, x, tmp_path / "m.onnx")
    (output,) = open_engine(tmp_path / "m.onnx").run(x)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[fmt]
    w, b = (p.detach().to(dtype).double() for p in (model.weight, model.bias))
    exact = x.to(dtype).double() @ w.T + b
    # One rounding of the exact sum, give or take float32's own.
    spacing = exact.abs() * torch.finfo(dtype).eps
    assert ((output.double() - exact).abs() <= spacing * 0.51 + 1e-6).all()
    graph = cast_through(ir.load(tmp_path / "m.onnx"))
    onnx.checker.check_model(ir.to_proto(graph))


@pytest.mark.parametrize(
    ("recipe", "opset"),
    [
        pytest.param({"weights": "fp8_e4m3", "inputs": "fp8_e4m3"}, 19, id="float8 behind Relu"),
        pytest.param(
            {"rules": [{"name": "1", "weights": "int4", "inputs": "fp32"}]}, 21, id="opset 21"
        ),
        pytest.param({"rules": [{"name": "1", "format": "bf16"}]}, 22, id="opset 22"),
    ],
)
def test_rewrites_that_break_a_graph_are_off(recipe: dict, opset: int, tmp_path) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU()]
    model, x = nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 4)), torch.randn(4, 3, 8, 8)
    lq.calibrate(lq.quantize(model, recipe), [x], progress=False)
    report = lq.export_onnx(model, x, tmp_path / "m.onnx")
    assert ir.load(tmp_path / "m.onnx").opset_imports[""] == opset
    assert report.optimized.sqnr_db > 30


# Building: the real builder, which needs no GPU.


def test_builds_an_engine_with_its_sidecar(exported, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    info = lq.build_engine(exported[2], tmp_path / "m.engine", batch=(1, 4, 16))
    assert (tmp_path / "m.engine").stat().st_size == pytest.approx(info.size_mb * 1e6)
    sidecar = json.loads((tmp_path / "m.engine.json").read_text())
    assert sidecar["formats"] == {"0": "int8"}
    assert list(sidecar["inputs"].values()) == [[-1, 3, 8, 8]]
    assert list(sidecar["outputs"]) == ["output"]
    assert sidecar["batch"] == [1, 4, 16]
    assert len(sidecar["onnx_sha256"]) == 64
    assert sidecar["builder"].startswith("tensorrt")


def test_report_tells_what_was_built(exported, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    info = lq.build_engine(exported[2], tmp_path / "m.engine", compute_capability="SM89")
    assert info.built_formats == info.formats == {"0": "int8"}
    assert info.fallbacks == {}
    computing = [layer for layer in info.layers if layer.multiplies and "0" in layer.onnx]
    assert [layer.inputs for layer in computing] == [("int8",)]
    quantizing = [layer for layer in info.layers if "0.input_quantizer" in layer.onnx]
    assert (quantizing[0].inputs, quantizing[0].outputs) == (("fp32",), ("int8",))
    assert "1 layers that multiply: 1 in int8" in info.summary()
    fell = dataclasses.replace(info, built_formats={"0": "fp32"})
    assert fell.fallbacks == {"0": "fp32"}
    assert "fell back: 0 planned int8, built fp32" in fell.summary()
    weights_alone = dataclasses.replace(fell, formats={"0": "int8/fp32"})
    assert weights_alone.fallbacks == {}


def test_builds_are_reproducible(exported, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    infos = [lq.build_engine(exported[2], tmp_path / f"{i}.engine") for i in range(2)]
    built = [(tmp_path / f"{i}.engine").read_bytes() for i in range(2)]
    assert built[0] == built[1]
    assert infos[0].engine_sha256 == infos[1].engine_sha256 == sha256(tmp_path / "0.engine")


def test_height_and_width_may_vary(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, x = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()), torch.randn(2, 3, 8, 8)
    path = tmp_path / "m.onnx"
    lq.export_onnx(model, x, path, dynamic_image=True)
    with pytest.raises(ValueError, match=r"-1, 3, -1, -1.*give `image`"):
        lq.build_engine(path, tmp_path / "m.engine")
    with pytest.raises(ValueError, match=r"`image` as smallest <= best <= largest"):
        lq.build_engine(path, tmp_path / "m.engine", image=(16, 8, 32))
    info = lq.build_engine(path, tmp_path / "m.engine", image=(8, 16, 32))
    assert list(info.inputs.values()) == [[-1, 3, -1, -1]]
    assert json.loads((tmp_path / "m.engine.json").read_text())["image"] == [8, 16, 32]


def test_engine_for_another_gpu_is_refused(exported, tmp_path, monkeypatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    lq.build_engine(exported[2], tmp_path / "m.engine", compute_capability="SM89")
    monkeypatch.setattr(tensorrt_runner, "capability_at_hand", lambda: "SM86")
    with pytest.raises(RuntimeError, match=r"built for SM89, but the GPU here is SM86"):
        open_engine(tmp_path / "m.engine")
    monkeypatch.setattr(tensorrt_runner, "capability_at_hand", lambda: None)
    with pytest.raises(RuntimeError, match="need an NVIDIA GPU"):
        open_engine(tmp_path / "m.engine")


def test_compute_capability_is_chosen(exported, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    info = lq.build_engine(exported[2], tmp_path / "m.engine", compute_capability="SM86")
    assert info.compute_capability == "SM86"
    with pytest.raises(ValueError, match=r"SM89.*'SM42'"):
        lq.build_engine(exported[2], tmp_path / "n.engine", compute_capability="SM42")
    assert not (tmp_path / "n.engine").exists()


def test_a_graph_that_cannot_be_parsed(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    nodes = [helper.make_node("NoSuchOp", ["x"], ["y"], name="odd")]
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "xy"]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", info[:1], info[1:])), tmp_path / "m")
    with pytest.raises(RuntimeError, match="NoSuchOp"):
        lq.build_engine(tmp_path / "m", tmp_path / "m.engine")
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_refusals_before_any_work(exported, tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no.onnx"):
        lq.build_engine(tmp_path / "no.onnx", tmp_path / "m.engine")
    with pytest.raises(ValueError, match="batch"):
        lq.build_engine(exported[2], tmp_path / "m.engine", batch=(4, 2, 8))
    monkeypatch.setattr(engine, "BUILDERS", ("no_such_builder",))
    with pytest.raises(ImportError, match=r"install tensorrt .*install tensorrt-rtx "):
        lq.build_engine(exported[2], tmp_path / "m.engine")


def test_engine_of_another_version_is_refused(exported, tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    lq.build_engine(exported[2], tmp_path / "m.engine")
    sidecar = tmp_path / "m.engine.json"
    values = json.loads(sidecar.read_text()) | {"builder": "tensorrt 9.0"}
    sidecar.write_text(json.dumps(values))
    with pytest.raises(RuntimeError, match=r"tensorrt 9.0.*is installed"):
        open_engine(tmp_path / "m.engine")


def test_two_processes_write_one_file(exported, tmp_path) -> None:
    code = (
        "import sys; from lq.files import written_whole\n"
        "for i in range(200):\n"
        "    with written_whole(sys.argv[1]) as t: t.write_text(sys.argv[2] * 100_000)"
    )
    path = tmp_path / "f"
    writers = [subprocess.Popen([sys.executable, "-c", code, str(path), who]) for who in "ab"]
    assert [w.wait() for w in writers] == [0, 0]
    assert path.read_text() in ("a" * 100_000, "b" * 100_000)
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


@pytest.mark.gpu
def test_engine_runs_what_torch_computes(exported, tmp_path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    model, x, path = exported
    info = lq.build_engine(path, tmp_path / "m.engine")
    assert info.built_formats == {"0": "int8"}
    (output,) = open_engine(tmp_path / "m.engine").run(x)
    with torch.no_grad():
        expected = model(x)
    assert lq.functional.sqnr_db(expected, output.cpu()) > 30
    assert lq.parity(model, tmp_path / "m.engine", [x]).sqnr_db > 30
