"""Times of layers on the engine at hand: found under their names, kept by hardware."""

import dataclasses
import json

import onnx_ir as ir
import pytest
import torch
from torch import nn

import lq
from lq import latency
from lq.costs import count_costs
from lq.engines.profile import parse_onnxruntime_profile, share_among_nodes
from lq.export.engine import EngineInfo, build_engine, find_builder
from lq.export.inspector import BuiltLayer
from lq.export.onnxruntime_encoding import ENCODINGS
from lq.export.owners import node_owners
from lq.export.to_onnx import trace
from lq.models import digits_cnn

BATCH = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """Costs of the digits net with its times, and the file that keeps them."""
    torch.manual_seed(0)
    cache = tmp_path_factory.mktemp("latency") / "latency.json"
    model = digits_cnn().eval()
    return model, lq.measure_latency(model, BATCH, ["int8", "bf16"], cache), cache


def test_every_layer_has_a_time_in_every_format_that_runs(timed, caplog) -> None:
    model, costs, _ = timed
    assert set(costs.latency) == set(count_costs(model, BATCH).layers)
    for times in costs.latency.values():
        assert set(times) == {"fp32", "int8"}  # ONNX Runtime's CPU has no bf16 convolution
        assert all(0 < ms < 100 for ms in times.values())
    assert costs.rest_ms > 0  # pooling
    assert costs.engine == latency.engine_at_hand()
    assert not lq.surgery.quantizers(model)
    dearest = max(costs.layers, key=lambda name: costs.layers[name].macs)
    assert costs.latency[dearest]["fp32"] > costs.latency["9"]["fp32"]


def test_a_format_that_does_not_run_is_named(timed) -> None:
    _, costs, _ = timed
    limits = lq.PrecisionConstraints(max_latency_ms=1, formats=["bf16"])
    found = lq.sensitivity.Sensitivity(
        found=[], units={"0": ("0",)}, formats=("bf16",), method="exact", metric="kl", n=1
    )
    rows = [lq.sensitivity.LayerSensitivity(layer="0", format="bf16", kl=0.1)]
    found = dataclasses.replace(found, found=rows)
    with pytest.raises(
        ValueError, match=r"measured latency of layer '0' in bf16 on .* onnxruntime"
    ):
        lq.search(found, limits, costs)


def test_times_are_kept_by_hardware(timed, monkeypatch, tmp_path) -> None:
    model, costs, cache = timed
    stored = json.loads(cache.read_text())
    assert list(stored) == [latency.hardware_name("onnxruntime")]
    (models,) = stored.values()
    (times,) = models.values()
    assert set(times) == {"fp32", "int8"}

    def refuse(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(latency, "_layer_times", refuse)
    assert lq.measure_latency(model, BATCH, ["int8"], cache) == costs
    other = tmp_path / "other.json"
    with pytest.raises(AssertionError, match="measured again"):
        lq.measure_latency(model, BATCH, ["int8"], other)
    (tmp_path / "broken.json").write_text("[1]")
    with pytest.raises(ValueError, match="to hold latencies that lq saved"):
        lq.measure_latency(model, BATCH, ["int8"], tmp_path / "broken.json")


def test_times_are_those_of_the_same_graph_and_recipe() -> None:
    def net(activation: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Conv2d(1, 4, 3), activation, nn.Conv2d(4, 4, 3)).eval()

    keys = [
        latency._key(net(nn.ReLU()), BATCH, "onnxruntime_int8"),
        latency._key(net(nn.GELU()), BATCH, "onnxruntime_int8"),
        latency._key(net(nn.ReLU()), BATCH, "tensorrt_int8"),
        latency._key(net(nn.ReLU()), BATCH[..., :6, :6], "onnxruntime_int8"),
    ]
    assert len(set(keys)) == 4
    assert latency._key(net(nn.ReLU()), BATCH[:2], "onnxruntime_int8") == keys[0]


def test_a_plan_of_one_format_takes_what_the_profile_says(timed) -> None:
    _, costs, cache = timed
    (models,) = json.loads(cache.read_text()).values()
    (times,) = models.values()
    for format in ("fp32", "int8"):
        plan = dict.fromkeys(costs.layers, format)
        assert costs.total("latency_ms", plan) == pytest.approx(sum(times[format].values()))


def test_a_layer_without_a_time_is_named(monkeypatch, caplog) -> None:
    monkeypatch.setattr(latency, "_profile", lambda *args: {"0": 1.0})
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
    lq.measure_latency(model, torch.randn(2, 4), [])
    assert "no time of ['2']" in caplog.text


def test_the_graph_as_a_whole(timed) -> None:
    model, _, _ = timed
    whole = latency.file_latency(model, BATCH, "onnxruntime")
    assert 0 < whole < 100


@pytest.mark.parametrize("format", ["fp32", "int8", "fp16"])
def test_nodes_belong_to_their_layers(format: str) -> None:
    torch.manual_seed(0)
    model = digits_cnn().eval()
    plan = dict.fromkeys(count_costs(model, BATCH).layers, format)
    lq.quantize(model, lq.Recipe.from_plan(plan, "onnxruntime_int8"))
    if format != "fp32":
        lq.calibrate(model, [BATCH], progress=False)
    graph = trace(model, BATCH)
    ENCODINGS["onnxruntime"](graph.graph)
    owners = node_owners(graph.graph)
    assert {owners[name] for name in plan} == set(plan)
    by_type = {node.op_type: owners.get(str(node.name)) for node in graph.graph}
    for name, value in owners.items():
        if "input_quantizer" in name or "weight_quantizer" in name:
            assert name.startswith(f"{value}.")
    assert by_type["Add"] is None
    assert by_type.get("ReduceMean", by_type.get("GlobalAveragePool")) is None
    if format == "fp32":
        first = next(node for node in graph.graph if node.op_type == "Relu")
        assert owners[str(first.outputs[0].name)] == "0"


def test_times_of_a_profile() -> None:
    def event(name: str, dur: int, cat: str = "Node") -> dict:
        return {"cat": cat, "name": name, "dur": dur}

    events = [
        event("model_run", 9000, "Session"),
        event("conv_token_3_kernel_time", 9000),
        event("conv_token_3_kernel_time", 100),
        event("conv_token_3_kernel_time", 300),
        event("conv_nchwc_kernel_time", 1000),
        event("conv_fence_before", 7000),
        event("InsertedPrecisionFreeCast_bn/out_bn_nchwc_kernel_time", 2000),
    ]
    assert parse_onnxruntime_profile(events, skip=1) == {"conv": 1.2, "bn/out": 2.0}


def test_kernels_share_their_time_among_nodes() -> None:
    layers = [
        BuiltLayer("k1", "conv", (), (), ("a", "b")),
        BuiltLayer("k2", "gemm", (), (), ("b",)),
        BuiltLayer("k3", "reformat", (), (), ()),
    ]
    assert share_among_nodes({"k1": 2.0, "k2": 0.5, "k3": 0.1}, layers) == {
        "a": 1.0,
        "b": 1.5,
        "k3": 0.1,
    }


@pytest.mark.skipif(find_builder() is None, reason="no TensorRT builder is installed")
def test_what_an_engine_is_can_be_read_back(tmp_path) -> None:
    torch.manual_seed(0)
    graph = trace(nn.Sequential(nn.Linear(16, 16), nn.ReLU()).eval(), torch.randn(2, 16))
    ir.save(graph, tmp_path / "m.onnx")
    info = build_engine(tmp_path / "m.onnx", tmp_path / "m.engine")
    assert EngineInfo.load(tmp_path / "m.engine") == info


@pytest.mark.gpu
def test_times_of_tensorrt() -> None:
    model = digits_cnn().eval()
    costs = lq.measure_latency(model, BATCH, ["int8", "fp16"])
    assert costs.engine == "tensorrt"
    assert all(ms > 0 for times in costs.latency.values() for ms in times.values())
    assert latency.file_latency(model, BATCH, "tensorrt") > 0
