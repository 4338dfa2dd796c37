"""OpenVINO runs the same file, through the same interface."""

import threading

import pytest
import torch
from torch import nn

import lq
from lq.engines import open_engine
from lq.engines.onnxruntime_runner import OnnxRuntimeRunner

pytest.importorskip("openvino")
from lq.engines.openvino_runner import OpenVINORunner


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU6()]
    layers += [nn.Conv2d(16, 16, 3, groups=16), nn.BatchNorm2d(16), nn.ReLU6()]
    layers += [nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model, x = nn.Sequential(*layers, nn.Linear(32, 10)), torch.randn(4, 3, 64, 64)
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
    path = tmp_path_factory.mktemp("openvino") / "m.onnx"
    lq.export_onnx(model, x, path, target="openvino")
    return path, x


def test_computes_what_onnx_runtime_computes(exported) -> None:
    path, x = exported
    (expected,) = OnnxRuntimeRunner(path, optimize=False).run(x)
    (output,) = open_engine(path, engine="openvino").run(x)
    assert lq.functional.sqnr_db(expected, output) > 15
    assert torch.equal(output.argmax(1), expected.argmax(1))


def test_layers_run_in_integers(exported) -> None:
    runner = OpenVINORunner(exported[0])
    nodes = [node.get_rt_info() for node in runner.compiled.get_runtime_model().get_ops()]
    kinds = [
        (info["layerType"].astype(str), info["runtimePrecision"].astype(str)) for info in nodes
    ]
    convolutions = [precision for kind, precision in kinds if kind == "Convolution"]
    assert len(convolutions) == 3
    assert set(convolutions) <= {"i8", "u8"}


def test_float_layers_are_not_rounded_to_bf16(tmp_path) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(64, 64).eval(), torch.randn(8, 64)
    lq.export_onnx(model, x, tmp_path / "m.onnx")
    with torch.no_grad():
        expected = model(x)
    (output,) = OpenVINORunner(tmp_path / "m.onnx").run(x)
    assert lq.functional.sqnr_db(expected, output) > 100
    rounded = OpenVINORunner(tmp_path / "m.onnx", precision="bf16")
    assert rounded.name == "OpenVINO CPU bf16"
    assert lq.functional.sqnr_db(expected, rounded.run(x)[0]) > 30


@pytest.mark.parametrize(("hint", "threads"), [("latency", 1), ("throughput", 2)])
def test_hint_and_threads_reach_the_engine(exported, hint, threads) -> None:
    runner = OpenVINORunner(exported[0], hint=hint, threads=threads)
    assert runner.compiled.get_property("INFERENCE_NUM_THREADS") == threads
    assert str(runner.compiled.get_property("PERFORMANCE_HINT")).endswith(hint.upper())


def test_runs_from_several_threads_at_once(exported) -> None:
    path, x = exported
    runner = OpenVINORunner(path, hint="throughput")
    batches = [x[i : i + 1] for i in range(4)]
    expected = [runner.run(batch)[0] for batch in batches]
    found: dict[int, list[torch.Tensor]] = {i: [] for i in range(4)}

    def work(i: int) -> None:
        found[i] += [runner.run(batches[i])[0] for _ in range(5)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(y, expected[i]) for i, outputs in found.items() for y in outputs)


def test_evaluate_takes_it(exported) -> None:
    path, x = exported
    (logits,) = open_engine(path, engine="openvino").run(x)
    result = lq.evaluate(path, [(x, logits.argmax(1))], engine="openvino")
    assert (result.engine, result.top1, result.n) == ("OpenVINO CPU", 1.0, 4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param({"hint": "latencyy"}, "hint.*'latencyy'.*latency", id="hint"),
        pytest.param({"precision": "fp16"}, "precision.*'fp16'", id="precision"),
    ],
)
def test_unknown_settings(exported, change, match) -> None:
    with pytest.raises(ValueError, match=match):
        OpenVINORunner(exported[0], **change)


def test_wrong_inputs_and_engines(exported, tmp_path) -> None:
    path, x = exported
    with pytest.raises(ValueError, match=r"\[\?, 3, 64, 64\].*\[4, 1, 64, 64\]"):
        open_engine(path, engine="openvino").run(x[:, :1])
    with pytest.raises(ValueError, match="did you mean 'openvino'"):
        open_engine(path, engine="openvinoo")
    with pytest.raises(ValueError, match=r"\.onnx file for engine 'openvino'"):
        open_engine(nn.Identity(), engine="openvino")
    with pytest.raises(FileNotFoundError, match=r"no\.onnx"):
        open_engine(tmp_path / "no.onnx", engine="openvino")
