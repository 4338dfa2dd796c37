"""Looking into files: each kind beside the model or object it was saved from."""

from __future__ import annotations

import json
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import lq
from lq import cli
from lq.calibration import find_ranges
from lq.inspection.command import main
from lq.surgery import quantizers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.conv(x))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        Block(),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ).eval()


RECIPE = {"rules": [{"name": "7", "format": "fp16"}, {"type": "ConvTranspose2d", "format": "int6"}]}


@pytest.fixture
def model() -> nn.Module:
    model = lq.quantize(net(), RECIPE)
    lq.calibrate(model, [torch.randn(4, 3, 8, 8)], progress=False)
    return model


def rows(found: lq.inspection.Inspection, key: str = "name") -> dict[str, dict]:
    return {row[key]: dict(row) for row in found.rows}


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".safetensors"])
def test_weights(model, tmp_path, suffix) -> None:
    path, prefix = tmp_path / f"m{suffix}", ""
    state = model.state_dict()
    if suffix == ".safetensors":
        save_file({k: v.clone() for k, v in state.items()}, path)
    elif suffix == ".ckpt":
        prefix = "model."
        state = {prefix + k: v for k, v in state.items()}
        torch.save({"state_dict": state, "epoch": 3, "global_step": 12}, path)
    else:
        torch.save(state, path)

    found = lq.inspect(path)

    assert found.kind == ("checkpoint" if suffix == ".ckpt" else "weights")
    assert found.facts.get("epoch") == (3 if suffix == ".ckpt" else None)
    assert found.facts["quantizers"] == sum(key.endswith("_quantizer.scale") for key in state)
    assert found.facts["layers"] == {"int8": 2, "int6": 1, "fp16": 1}
    assert found.not_calibrated == []
    parts = rows(found)
    for name in ("0", "3.conv", "4"):
        layer, row = model.get_submodule(name), parts[prefix + name]
        spec, amax = layer.input_quantizer.spec, layer.input_quantizer.amax.item()
        assert row["format"] == spec.format
        assert row["shape"] == list(layer.weight.shape)
        assert row["input range"][1] == pytest.approx(amax, rel=1e-6)
        assert row["input range"][0] == pytest.approx(-amax * (spec.qmax + 1) / spec.qmax, rel=1e-6)
        weights = layer.weight_quantizer.amax
        ends = [weights.min().item(), weights.max().item()]
        assert row["weight amax"] == pytest.approx(ends, rel=1e-6)
        assert row["kB"] == layer.weight.numel() * 4 / 1e3
    assert parts[prefix + "7"]["format"] == "fp16"
    assert parts[prefix + "7"]["input range"] is None
    site = parts[prefix + "3.x_quantizer"]
    assert site["input range"][1] == pytest.approx(model[3].x_quantizer.amax.item(), rel=1e-6)


def test_what_is_not_calibrated(tmp_path) -> None:
    model = lq.quantize(net(), "tensorrt_int8")
    model[0].input_quantizer.amax = torch.tensor(1.0)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    found = lq.inspect(tmp_path / "m.pth")
    expected = [n for n, q in quantizers(model).items() if not q.is_calibrated]
    assert {*expected} <= {*found.not_calibrated}  # a shared one goes by all its names
    assert "0.input_quantizer" not in found.not_calibrated
    assert rows(found)["7"]["input range"] == "not calibrated"
    assert "Not calibrated: 0.weight_quantizer" in str(found)


def test_float_weights(tmp_path) -> None:
    torch.save(net().bfloat16().state_dict(), tmp_path / "m.pth")
    found = lq.inspect(tmp_path / "m.pth")
    assert found.facts["layers"] == {"bf16": 4}
    assert (found.facts["recipe"], found.facts["quantizers"]) == (None, 0)


def test_learned_ranges(tmp_path) -> None:
    inputs = {"format": "int4", "range": "lsq", "symmetric": False}
    model = lq.quantize(net(), {"inputs": inputs, "residual": None})
    lq.calibrate(model, [torch.randn(4, 3, 8, 8)], progress=False)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    low, high = rows(lq.inspect(tmp_path / "m.pth"))["0"]["input range"]
    quantizer = model[0].input_quantizer
    assert low == pytest.approx(quantizer.offset.item())
    assert high - low == pytest.approx(15 * quantizer.scale.item(), rel=1e-6)


def test_without_signs_the_range_is_not_guessed(tmp_path) -> None:
    model = lq.quantize(net(), "openvino_int8")
    lq.calibrate(model, [torch.randn(4, 3, 8, 8)], progress=False)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    row = rows(lq.inspect(tmp_path / "m.pth"))["3.conv"]
    assert row["input range"] == f"{model[3].conv.input_quantizer.scale.item():.3g} a code"


def test_graph_and_engine(tmp_path, capsys) -> None:
    model = lq.quantize(net(), {"rules": [{"name": "7", "format": "fp16"}]})
    x = torch.randn(4, 3, 8, 8)
    lq.calibrate(model, [x], progress=False)
    path = tmp_path / "m.onnx"
    lq.export_onnx(model, x, path)
    found = lq.inspect(path)
    assert found.facts["layers"] == {"int8": 3, "fp16": 1}
    parts = rows(found, "node")
    for name in ("0", "3.conv", "4"):
        layer, row = model.get_submodule(name), parts[name]
        assert row["input range"][1] == pytest.approx(layer.input_quantizer.amax.item(), rel=1e-6)
        weights = layer.weight_quantizer.amax
        assert max(row["weight amax"]) <= weights.max().item() * 4  # BatchNorm is folded in
        assert row["kB"] == layer.weight.numel() / 1e3
    assert main([str(path)]) == 0
    assert "3.conv" in capsys.readouterr().out


def test_engine(tmp_path) -> None:
    pytest.importorskip("tensorrt_rtx")
    model, x = lq.quantize(net(), "tensorrt_int8"), torch.randn(4, 3, 8, 8)
    lq.calibrate(model, [x], progress=False)
    lq.export_onnx(model, x, tmp_path / "m.onnx")
    info = lq.build_engine(tmp_path / "m.onnx", tmp_path / "m.engine")
    found = lq.inspect(tmp_path / "m.engine")
    assert {row["layer"]: row["built"] for row in found.rows} == info.built_formats
    assert found.facts["sidecar"] == "is the engine's"
    (tmp_path / "m.engine").write_bytes(b"another")
    assert "another engine" in lq.inspect(tmp_path / "m.engine").facts["sidecar"]
    (tmp_path / "m.engine.json").write_text("{}")
    with pytest.raises(ValueError, match="to be the sidecar of an engine"):
        lq.inspect(tmp_path / "m.engine")
    (tmp_path / "m.engine.json").unlink()
    with pytest.raises(FileNotFoundError, match="Expected the sidecar"):
        lq.inspect(tmp_path / "m.engine")


def test_recipe_and_plan(tmp_path) -> None:
    recipe = lq.Recipe.from_dict(RECIPE)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    found = lq.inspect(tmp_path / "recipe.yaml")
    assert found.kind == "recipe"
    assert [row["format"] for row in found.rows] == ["fp16", "int6"]
    lq.PrecisionPlan({"a": "int8", "b": "fp16"}).to_yaml(tmp_path / "plan.yaml", "openvino_int8")
    found = lq.inspect(tmp_path / "plan.yaml")
    assert found.kind == "plan"
    assert found.facts["layers"] == {"int8": 1, "fp16": 1}
    assert found.facts["residual"] == "both"
    assert {row["layer"]: row["format"] for row in found.rows} == {"a": "int8", "b": "fp16"}


def test_sweep_and_ranges(tmp_path) -> None:
    x = torch.randn(4, 3, 8, 8)
    sweep = lq.sweep(net(), [(x, torch.tensor([0, 1, 2, 3]))], progress=False)
    sweep.save(tmp_path / "s.json")
    found = lq.inspect(tmp_path / "s.json")
    assert found.kind == "sensitivity"
    assert [row["unit"] for row in found.rows] == [row.layer for row in sweep.ranked("int8")]
    model = lq.quantize(net(), "tensorrt_int8")
    ranges = find_ranges(model, [x], "max", cache=tmp_path / "r.json")
    found = lq.inspect(tmp_path / "r.json")
    assert found.kind == "ranges"
    amax = {row["quantizer"]: row["amax"] for row in found.rows}
    assert amax["0.input_quantizer"] == pytest.approx(float(ranges.found["0.input_quantizer"].amax))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("none.onnx", None, "there is no file", id="missing"),
        pytest.param("m.bin", b"x", "that ends in .ckpt", id="unknown"),
        pytest.param("m.onnx", b"\x08x", "to be an ONNX model", id="onnx"),
        pytest.param("m.ckpt", b"x", "to be a checkpoint", id="checkpoint"),
        pytest.param("m.safetensors", b"x", "to be a checkpoint", id="safetensors"),
        pytest.param("m.yaml", b"inputs: int9", "known number format", id="recipe"),
        pytest.param("m.yaml", b"a: [", "to be YAML", id="yaml"),
        pytest.param("m.json", b"[1", "to be a JSON file of lq", id="json"),
        pytest.param("m.json", b'{"a": 1}', "a sweep, ranges or a comparison", id="other"),
        pytest.param("m.json", b'{"ranges": 1}', "cannot be read", id="ranges"),
        pytest.param("m.engine", b"x", "Expected the sidecar", id="engine"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, capsys, name, content, message) -> None:
    path: Path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("lq: error: ")
    assert message in said
    assert said.count("\n") == 1


def test_directory(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="there is a directory"):
        lq.inspect(tmp_path)


def test_nothing_is_unpickled(tmp_path) -> None:
    torch.save({"state_dict": {}, "model": net()}, tmp_path / "m.pth")
    with pytest.raises(ValueError, match="pickled objects"):
        lq.inspect(tmp_path / "m.pth")


def test_command(model, tmp_path, capsys) -> None:
    path = tmp_path / "m.pth"
    torch.save(model.state_dict(), path)
    with pytest.raises(SystemExit) as left:
        cli.main(["inspect", str(path), "--json"])
    assert left.value.code == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain == json.loads(json.dumps(lq.inspect(path).to_dict()))
    with pytest.raises(SystemExit) as left:
        cli.main(["inspect", "--help"])
    assert left.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_checkpoint_of_a_fit(tmp_path) -> None:
    module = lq.QuantModule("lq.models.digits_cnn", recipe="tensorrt_int8")
    trainer = L.Trainer(logger=False, enable_checkpointing=False, max_epochs=0)
    trainer.strategy.connect(module)
    module.configure_model()
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    found = lq.inspect(tmp_path / "last.ckpt")
    assert found.kind == "checkpoint"
    assert set(found.facts["layers"]) == {"int8"}
    assert len(found.not_calibrated) == found.facts["quantizers"]


def test_parameters_are_what_trains(model, tmp_path) -> None:
    trained = sum(p.numel() for p in net().parameters())
    for name, values in ("float", net().state_dict()), ("quantized", model.state_dict()):
        torch.save(values, tmp_path / f"{name}.pth")
        assert lq.inspect(tmp_path / f"{name}.pth").facts["parameters"] == trained


@pytest.mark.parametrize(
    "values",
    [
        pytest.param({"state_dict": {1: torch.ones(2)}}, id="numbers for names"),
        pytest.param({"state_dict": {"_lq_recipe": torch.ones(3)}}, id="no recipe"),
        pytest.param(
            {"state_dict": {"_lq_recipe": torch.tensor(list(b"[1]"), dtype=torch.uint8)}}, id="list"
        ),
    ],
)
def test_strange_checkpoints_end_in_a_line(tmp_path, values, capsys) -> None:
    torch.save(values, tmp_path / "m.ckpt")
    assert main([str(tmp_path / "m.ckpt")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_counts_that_are_tensors_are_passed_over(model, tmp_path, capsys) -> None:
    path = tmp_path / "m.ckpt"
    torch.save({"state_dict": model.state_dict(), "epoch": torch.tensor(3)}, path)
    assert main([str(path), "--json"]) == 0
    assert "epoch" not in json.loads(capsys.readouterr().out)


def test_an_empty_recipe_file_is_no_recipe(tmp_path) -> None:
    (tmp_path / "empty.yaml").write_text("\n")
    with pytest.raises(ValueError, match="it is empty"):
        lq.inspect(tmp_path / "empty.yaml")
