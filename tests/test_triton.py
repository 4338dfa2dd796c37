"""Triton's model repository: what the config says, against the ONNX file it was written for."""

import dataclasses
import functools
import hashlib
import json
import re
import tempfile
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper, numpy_helper, parser
from torch import nn

import lq
from lq.export import triton_repository
from lq.export.engine import EngineInfo

NAMES = {1: "FP32", 2: "UINT8", 6: "INT32", 7: "INT64", 9: "BOOL", 10: "FP16"}
"""Number of a type in ONNX -> its name in Triton."""


def parse(text):
    """Read protobuf's text format, as far as a config goes: field -> values in order."""
    tokens = re.findall(r'"(?:[^"\\]|\\.)*"|[\w.+-]+|[{}\[\],:]', text)
    assert "".join(tokens) == re.sub(r"\s", "", text)
    message, rest = _message(tokens)
    assert not rest
    return message


def _message(tokens):
    fields = {}
    while tokens and tokens[0] != "}":
        name, tokens = tokens[0], tokens[1:]
        if tokens[0] == "{" or tokens[:2] == [":", "{"]:
            value, tokens = _message(tokens[tokens.index("{") + 1 :])
            assert tokens[0] == "}"
            fields.setdefault(name, []).append(value)
            tokens = tokens[1:]
        elif tokens[1] == "[":
            end = tokens.index("]")
            fields.setdefault(name, []).extend(json.loads("".join(tokens[1 : end + 1])))
            tokens = tokens[end + 1 :]
        else:
            assert tokens[0] == ":"
            fields.setdefault(name, []).append(tokens[1])
            tokens = tokens[2:]
    return fields, tokens


def check_with_triton(text):
    """Parse a config with Triton's own schema, where its client is installed."""
    protos = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    from google.protobuf import text_format

    return text_format.Parse(text, protos.ModelConfig())


def exported(folder, dynamic_batch=True, dynamic_image=False):
    path = folder / "net.onnx"
    path.write_bytes(_exported(dynamic_batch, dynamic_image))
    return path


@functools.cache
def _exported(dynamic_batch, dynamic_image):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    x = torch.rand(2, 3, 16, 16)
    lq.quantize(model, "tensorrt_int8")
    lq.calibrate(model, [x], progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        lq.export_onnx(model, x, path, dynamic_batch=dynamic_batch, dynamic_image=dynamic_image)
        return path.read_bytes()


def shapes(path, batched):
    """What the ONNX file says of its inputs and outputs."""
    graph = onnx.load(path).graph
    found = {}
    for value in [*graph.input, *graph.output]:
        tensor = value.type.tensor_type
        dims = [d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim]
        found[value.name] = (f"TYPE_{NAMES[tensor.elem_type]}", dims[1:] if batched else dims)
    return found


CASES = {
    "dynamic": ({}, 64),
    "dynamic-image": ({"dynamic_image": True}, 64),
    "fixed": ({"dynamic_batch": False}, 0),
}


@pytest.mark.parametrize(("options", "largest"), CASES.values(), ids=CASES)
def test_config_says_what_the_file_says(tmp_path, options, largest):
    path = exported(tmp_path, **options)
    folder = triton_repository(path, tmp_path / "models", "digits")
    assert folder == tmp_path / "models" / "digits"
    assert (folder / "1" / "model.onnx").read_bytes() == path.read_bytes()
    found = parse((folder / "config.pbtxt").read_text())
    assert found["name"] == ['"digits"']
    assert found["backend"] == ['"onnxruntime"']
    assert found["max_batch_size"] == [str(largest)]
    said = {
        json.loads(t["name"][0]): (t["data_type"][0], t["dims"])
        for t in found["input"] + found["output"]
    }
    assert said == shapes(path, batched=largest > 0)
    assert found["instance_group"] == [{"count": ["1"], "kind": ["KIND_AUTO"]}]
    assert ("dynamic_batching" in found) == (largest > 0)


@pytest.mark.parametrize(("options", "largest"), CASES.values(), ids=CASES)
def test_tritons_own_schema_reads_it(tmp_path, options, largest):
    path = exported(tmp_path, **options)
    text = (triton_repository(path, tmp_path / "models") / "config.pbtxt").read_text()
    config = check_with_triton(text)
    assert (config.name, config.max_batch_size) == ("net", largest)
    types = type(config.input[0]).DESCRIPTOR.fields_by_name["data_type"].enum_type
    said = {
        t.name: (types.values_by_number[t.data_type].name, list(t.dims))
        for t in [*config.input, *config.output]
    }
    assert said == shapes(path, batched=largest > 0)


def test_settings(tmp_path):
    path = exported(tmp_path)
    triton_repository(path, tmp_path / "models")
    folder = triton_repository(path, tmp_path / "models", None, 2, 8, 500, 3, "gpu")
    assert sorted(p.name for p in folder.iterdir()) == ["1", "2", "config.pbtxt"]
    found = parse((folder / "config.pbtxt").read_text())
    assert found["max_batch_size"] == ["8"]
    assert found["dynamic_batching"] == [{"max_queue_delay_microseconds": ["500"]}]
    assert found["instance_group"] == [{"count": ["3"], "kind": ["KIND_GPU"]}]


GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
example (float[n] lengths, int64[n, 5] ids, bool[n, 5] mask) => (float16[n, 5] y)
{
    masked = Cast <to = 10> (mask)
    long = Cast <to = 10> (ids)
    y = Mul (masked, long)
}
"""


def test_other_types_and_tensors_of_one_axis(tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(parser.parse_model(GRAPH), path)
    text = (triton_repository(path, tmp_path / "models") / "config.pbtxt").read_text()
    found = parse(text)
    lengths, ids, mask = found["input"]
    assert (lengths["dims"], lengths["reshape"]) == ([1], [{"shape": []}])
    assert (ids["data_type"], ids["dims"]) == (["TYPE_INT64"], [5])
    assert mask["data_type"] == ["TYPE_BOOL"]
    assert found["output"][0]["data_type"] == ["TYPE_FP16"]


def engine(folder, builder="tensorrt 10.13.0", batch=(1, 8, 32)):
    """An ONNX file, and what stands for its engine, with a sidecar as a build writes it."""
    path, built = exported(folder), folder / "net.engine"
    built.write_bytes(b"plan")
    info = EngineInfo(
        builder=builder,
        compute_capability="SM89",
        onnx=path.name,
        onnx_sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        inputs={},
        outputs={},
        batch=batch,
        image=None,
        formats={},
        built_formats={},
        layers=[],
        engine_sha256="",
        size_mb=0.0,
        build_s=0.0,
    )
    EngineInfo.path_of(built).write_text(json.dumps(dataclasses.asdict(info)))
    return built


def test_an_engine_has_its_own_largest_batch(tmp_path):
    built = engine(tmp_path)
    folder = triton_repository(built, tmp_path / "models")
    assert (folder / "1" / "model.plan").read_bytes() == b"plan"
    found = parse((folder / "config.pbtxt").read_text())
    assert found["backend"] == ['"tensorrt"']
    assert found["max_batch_size"] == ["32"]
    assert found["input"][0]["dims"] == [3, 16, 16]


def test_engines_that_cannot_be_served(tmp_path):
    with pytest.raises(ValueError, match="serve its ONNX file"):
        triton_repository(engine(tmp_path, "tensorrt_rtx 1.7"), tmp_path / "models")
    with pytest.raises(ValueError, match="smallest batch is 1"):
        triton_repository(engine(tmp_path, batch=(4, 8, 8)), tmp_path / "models")
    built = engine(tmp_path)
    (tmp_path / "net.onnx").write_bytes(b"another")
    with pytest.raises(FileNotFoundError, match="another one"):
        triton_repository(built, tmp_path / "models")
    EngineInfo.path_of(built).unlink()
    with pytest.raises(FileNotFoundError, match="sidecar"):
        triton_repository(built, tmp_path / "models")
    assert not (tmp_path / "models").exists()


def test_weights_in_another_file(tmp_path):
    path = tmp_path / "m.onnx"
    weight = numpy_helper.from_array(torch.rand(256, 4).numpy(), "w")
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x, y = (helper.make_tensor_value_info(n, 1, ["n", c]) for n, c in (("x", 256), ("y", 4)))
    model = helper.make_model(helper.make_graph([node], "g", [x], [y], [weight]))
    onnx.save(model, path, save_as_external_data=True, size_threshold=0, location="w.bin")
    with pytest.raises(ValueError, match="another file"):
        triton_repository(path, tmp_path / "models")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"name": "a/b"}, "`name`"),
        ({"version": 0}, "`version`"),
        ({"max_batch_size": 0}, "`max_batch_size`"),
        ({"queue_delay_us": -1}, "`queue_delay_us`"),
        ({"instances": 0}, "`instances`"),
        ({"device": "gpus"}, "did you mean 'gpu'"),
    ],
    ids=["name", "version", "batch", "delay", "instances", "device"],
)
def test_refused(tmp_path, arguments, match):
    with pytest.raises(ValueError, match=match):
        triton_repository(tmp_path / "m.onnx", tmp_path / "models", **arguments)
    with pytest.raises(FileNotFoundError, match="ONNX file"):
        triton_repository(tmp_path / "m.onnx", tmp_path / "models")


def test_axes_that_vary_apart_are_no_batch(tmp_path):
    path = tmp_path / "boxes.onnx"
    onnx.save(
        parser.parse_model("""
          <ir_version: 8, opset_import: ["" : 18]>
          net (float[batch, 3] x, float[boxes, 3] b) => (float[batch, 3] y, float[boxes, 3] z)
          { y = Relu (x) z = Relu (b) }"""),
        path,
    )
    config = parse((triton_repository(path, tmp_path / "models") / "config.pbtxt").read_text())
    assert config["max_batch_size"] == ["0"]
    assert config["input"][0]["dims"] == [-1, 3]
    assert "dynamic_batching" not in config


def test_weights_are_no_inputs(tmp_path):
    weight = numpy_helper.from_array(torch.ones(3, 2).numpy(), "w")
    values = [
        helper.make_tensor_value_info("x", 1, ["n", 3]),
        helper.make_tensor_value_info("w", 1, [3, 2]),
    ]
    output = [helper.make_tensor_value_info("y", 1, ["n", 2])]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "net", values, output, [weight])
    path = tmp_path / "old.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)
    config = parse((triton_repository(path, tmp_path / "models") / "config.pbtxt").read_text())
    assert [part["name"] for part in config["input"]] == [['"x"']]
    assert config["max_batch_size"] == ["64"]


@pytest.mark.parametrize("version", [0, 1.5, True])
def test_versions_are_whole_numbers(tmp_path, version):
    lq.export_onnx(nn.Linear(4, 2), torch.ones(1, 4), tmp_path / "m.onnx")
    with pytest.raises(ValueError, match="Expected `version` to be at least 1"):
        triton_repository(tmp_path / "m.onnx", tmp_path / "models", version=version)
