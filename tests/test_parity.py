"""Parity finds what is wrong, and nothing where nothing is."""

import onnx
import pytest
import torch
import torchvision
from onnx import numpy_helper
from torch import nn

import lq
from lq.parity import compare


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1, 1)
    batches = [(torch.randn(4, 3, 48, 48), torch.zeros(4)) for _ in range(2)]
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), batches, progress=False)
    path = tmp_path_factory.mktemp("parity") / "m.onnx"
    lq.export_onnx(model, batches[0], path, batches=batches)
    return model, path, batches


def tampered(path, name: str, change):
    model = onnx.load(path)
    (tensor,) = [t for t in model.graph.initializer if t.name == name]
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    changed = path.with_name(f"{name}.onnx")
    onnx.save(model, changed)
    return changed


def test_agrees(exported) -> None:
    model, path, batches = exported
    report = lq.parity(model, path, batches)
    assert report.n == 8
    assert report.first_divergence is None
    assert report.max_code_difference <= 1
    assert report.confident_agreement == 1.0
    # 21 layers; the first is fed by the image, and three pairs share their input's quantizer.
    assert len(report.layers) == 17
    assert sum(layer.differing for layer in report.layers) < 1e-4 * sum(
        layer.total for layer in report.layers
    )


def test_size_is_that_of_integers(exported) -> None:
    model, path, _ = exported
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert path.stat().st_size < 0.26 * weights


@pytest.mark.parametrize(
    ("tensor", "change", "layer"),
    [
        pytest.param("layer2.0.conv2.weight.int8", lambda w: -w, "layer2.0.conv2", id="weight"),
        pytest.param("layer3.1.conv1.bias.folded", lambda b: b + 1, "layer3.1.conv1", id="bias"),
        pytest.param("conv1.weight.scale", lambda s: s * 1.2, "conv1", id="scale"),
    ],
)
def test_names_the_first_diverging_layer(exported, tensor, change, layer) -> None:
    model, path, batches = exported
    changed = tampered(path, tensor, change)
    with pytest.raises(RuntimeError, match=f"first diverging layer '{layer}'"):
        lq.parity(model, changed, batches)
    report = compare(model, changed, batches)
    # The layers are fed the same codes, so the error goes no further than a float shortcut does.
    assert len([part for part in report.layers if part.diverges]) <= 4


def test_last_layer_is_seen_end_to_end(exported) -> None:
    model, path, batches = exported
    with pytest.raises(RuntimeError, match="differs from the model"):
        lq.parity(model, tampered(path, "fc.weight.int8", lambda w: w[::-1].copy()), batches)


def test_no_batches(exported) -> None:
    model, path, _ = exported
    with pytest.raises(ValueError, match="at least one sample"):
        lq.parity(model, path, [])
