"""Processors without VNNI: their 16-bit sums saturate, and no runner lets them."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

import lq
from lq.engines import cpu, onnxruntime_runner, open_engine
from lq.engines.onnxruntime_runner import OnnxRuntimeRunner, load_graph

FLAGS = {
    "avx2": {"sse2", "avx2"},
    "avx512": {"sse2", "avx2", "avx512f", "avx512bw"},
    "vnni": {"sse2", "avx2", "avx512f", "avx512_vnni"},
    "avx_vnni": {"sse2", "avx2", "avx_vnni"},
    "arm": set(),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A layer of large weights and large inputs, all of one sign."""
    model = nn.Sequential(nn.Linear(32, 4), nn.ReLU(), nn.Linear(4, 4))
    nn.init.constant_(model[0].weight, 1.0)
    x = torch.rand(8, 32) * 0.1 + 0.9
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
    path = tmp_path_factory.mktemp("cpu") / "m.onnx"
    lq.export_onnx(model, x, path, target="onnxruntime")
    return path, x


@pytest.mark.parametrize("flags", FLAGS)
def test_flags(monkeypatch, flags) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: FLAGS[flags])
    assert cpu.saturates() is (flags in ("avx2", "avx512"))


def maddubs(inputs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Sums of products as ``vpmaddubsw`` adds them: pairs saturate at 16 bits."""
    products = inputs.astype(np.int64) * weights
    return (products[:, ::2] + products[:, 1::2]).clip(-(2**15), 2**15 - 1).sum(1)


@pytest.mark.parametrize(("largest", "wrong"), [(127, True), (64, False)])
def test_only_weights_of_8_bits_saturate(largest, wrong) -> None:
    inputs, weights = np.full((1, 32), 255), np.full((1, 32), largest)
    assert (maddubs(inputs, weights) != (inputs * weights).sum(1)).all() == wrong


def test_the_layer_is_named(exported) -> None:
    path, _ = exported
    model = load_graph(path)
    assert cpu.first_hazard(model) == "0"
    for value in model.graph.initializers.values():
        if value.name.endswith("weight.int8"):
            value.const_value = ir.tensor(value.const_value.numpy() // 2, name=value.name)
    assert cpu.first_hazard(model) is None


def proto(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


def test_onnxruntime_takes_kernels_that_do_not_saturate(exported, monkeypatch) -> None:
    path, x = exported
    (expected,) = OnnxRuntimeRunner(path).run(x)
    opened = []
    monkeypatch.setattr(cpu, "saturates", lambda: True)
    monkeypatch.setattr(onnxruntime_runner, "_serialized", lambda m: opened.append(m) or proto(m))
    (output,) = OnnxRuntimeRunner(path).run(x)
    assert torch.equal(output, expected)
    stored = [n.inputs[0] for n in opened[0].graph if n.op_type == "DequantizeLinear"]
    types = {value.const_value.dtype.name for value in stored if value.is_initializer()}
    assert types == {"UINT8", "INT32"}  # weights and biases


def test_openvino_refuses_with_a_remedy(exported, monkeypatch) -> None:
    pytest.importorskip("openvino")
    path, x = exported
    monkeypatch.setattr(cpu, "saturates", lambda: True)
    with pytest.raises(RuntimeError, match=r"VNNI.*layer '0'.*engine='onnxruntime'"):
        open_engine(path, engine="openvino")
    monkeypatch.setattr(cpu, "saturates", lambda: False)
    (output,) = open_engine(path, engine="openvino").run(x)
    assert output.shape == (8, 4)
