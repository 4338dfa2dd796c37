"""Models as they are published, without an edit: surgery, calibration, training, export, parity."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn

import lq
from lq.batches import tensors
from lq.functional import sqnr_db
from lq.surgery import left_float, quantized_layers, quantizers

RESNET = {"weights": None, "weights_backbone": None, "num_classes": 5}
FEW = tv.convnext.CNBlockConfig


class Case(NamedTuple):
    """A model and what is expected of it.

    `additions` counts the tensors of residual additions that are quantized; `left` is what every
    module that is left float is named with; `findings` is what the linter may find, and `EXPLAINED`
    says why.
    """

    make: Callable[[], nn.Module]
    additions: int
    image: int = 64
    left: tuple[str, ...] = ()
    findings: frozenset[str] = frozenset({"small-gemm"})
    recipe: dict[str, Any] = {}  # noqa: RUF012 - never changed
    slow: bool = False


def _with_head(model: tv.VisionTransformer) -> nn.Module:
    nn.init.normal_(model.heads.head.weight)  # its zeros would make every output the same
    return model


def _mobilenet_v3() -> nn.Module:
    block = partial(tv.mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    blocks = [
        block(16, 3, 16, 16, True, "RE", stride=2),
        block(16, 3, 72, 24, False, "RE", stride=1),
        block(24, 5, 96, 24, True, "HS", stride=1),
    ]
    return tv.MobileNetV3(blocks, 64, num_classes=10)


def _swin() -> nn.Module:
    return tv.SwinTransformer([4, 4], 32, [2], [2], [4, 4], num_classes=10)


def _convnext() -> nn.Module:
    return tv.ConvNeXt([FEW(16, 32, 2), FEW(32, None, 2)], layer_scale=0.5, num_classes=10)


def _detection_backbone() -> nn.Module:
    backbone = tv.detection.backbone_utils.resnet_fpn_backbone
    return backbone(backbone_name="resnet18", weights=None, trainable_layers=5)


EXPLAINED = {
    "small-gemm": "depthwise convolutions and heads of ten classes are small: a recipe with "
    "`fallback: fp16` leaves them out, this one was asked for int8 everywhere",
    "residual": "the sum feeds a LayerNorm, which computes in float: quantizing its stream would "
    "only cost accuracy (the policy of docs/recipes.md)",
}
NORMALIZED = frozenset(EXPLAINED)
READ = ("reads its weight without calling it",)
UNTRACED = ("cannot be traced",)
AUXILIARY = {"rules": [{"name": "aux*", "format": "skip"}]}  # they run in training only
CASES = {
    "resnet18": Case(lambda: tv.resnet18(num_classes=10), 8),
    "resnet50": Case(lambda: tv.resnet50(num_classes=10), 16, slow=True),
    "mobilenet_v2": Case(
        lambda: tv.MobileNetV2(inverted_residual_setting=[[1, 16, 1, 1], [6, 24, 3, 2]]), 2
    ),
    "mobilenet_v2-whole": Case(lambda: tv.mobilenet_v2(num_classes=10), 10, slow=True),
    "mobilenet_v3": Case(_mobilenet_v3, 1),
    "mobilenet_v3_small": Case(lambda: tv.mobilenet_v3_small(num_classes=10), 6, slow=True),
    "efficientnet_b0": Case(lambda: tv.efficientnet_b0(num_classes=10), 9, slow=True),
    "shufflenet_v2": Case(lambda: tv.ShuffleNetV2([2, 2, 1], [24, 48, 96, 192, 256]), 0),
    "shufflenet_v2_x1_0": Case(lambda: tv.shufflenet_v2_x1_0(num_classes=10), 0, slow=True),
    "densenet": Case(lambda: tv.DenseNet(16, (2, 2), 16, num_classes=10), 0),
    "densenet121": Case(lambda: tv.densenet121(num_classes=10), 0, slow=True),
    "googlenet": Case(
        lambda: tv.googlenet(num_classes=10, init_weights=False), 0, recipe=AUXILIARY
    ),
    "regnet_y_400mf": Case(lambda: tv.regnet_y_400mf(num_classes=10), 16, slow=True),
    "convnext": Case(_convnext, 4),
    "convnext_tiny": Case(lambda: tv.convnext_tiny(num_classes=10), 18, slow=True),
    "vit": Case(
        lambda: _with_head(tv.VisionTransformer(64, 16, 2, 2, 64, 128, num_classes=10)),
        0,
        findings=NORMALIZED,
    ),
    "vit_b_16": Case(
        lambda: _with_head(tv.vit_b_16(image_size=64)), 0, findings=NORMALIZED, slow=True
    ),
    "swin": Case(_swin, 0, left=READ, findings=NORMALIZED),
    "swin_t": Case(lambda: tv.swin_t(num_classes=10), 0, left=READ, findings=NORMALIZED, slow=True),
    "timm-resnet18": Case(lambda: timm.create_model("resnet18"), 8, slow=True),
    "timm-efficientnet_lite0": Case(lambda: timm.create_model("efficientnet_lite0"), 9, slow=True),
    "timm-repvgg_a0": Case(lambda: timm.create_model("repvgg_a0"), 39, slow=True),
    "timm-deit_tiny": Case(
        lambda: timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3),
        0,
        findings=NORMALIZED,
    ),
    "fcn_resnet50": Case(lambda: tv.segmentation.fcn_resnet50(**RESNET), 16, slow=True),
    "deeplabv3_mobilenet": Case(
        lambda: tv.segmentation.deeplabv3_mobilenet_v3_large(**RESNET), 10, slow=True
    ),
    "resnet18-fpn": Case(_detection_backbone, 8, left=UNTRACED, slow=True),
}


def images(size: int) -> Tensor:
    """Two images that are as smooth as photographs, near and far."""
    noise = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    coarse = F.interpolate(F.avg_pool2d(noise, 8) * 8, size=(size, size), mode="bilinear")
    return coarse + 0.1 * noise


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.mark.parametrize(
    "case",
    [pytest.param(n, id=n, marks=[pytest.mark.slow] * case.slow) for n, case in CASES.items()],
    indirect=True,
)
def test_works_without_edits(case: Case, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = case.make().eval(), images(case.image)
    with torch.no_grad():
        expected = tensors(model(x))

    lq.quantize(model, case.recipe)
    lq.calibrate(model, [x], progress=False)

    assert all(any(reason in text for reason in case.left) for text in left_float(model).values())
    assert bool(left_float(model)) is bool(case.left)
    assert added(model) == case.additions
    assert all(q.is_calibrated for q in quantizers(model).values())
    with torch.no_grad():
        outputs = tensors(model(x))
    assert all(sqnr_db(e, o) > 10 for e, o in zip(expected, outputs, strict=True))
    assert_trains(copy.deepcopy(model), x)  # a copy: training moves BatchNorm's statistics
    report = lq.export_onnx(model, x, tmp_path / "model.onnx")
    assert report.max_code_difference <= 1
    assert {finding.rule for finding in lq.lint(tmp_path / "model.onnx")} <= case.findings


def added(model: nn.Module) -> int:
    """Count the quantizers that are on more than a layer's input or weight."""
    names = [n for n, m in model.named_modules(remove_duplicate=False) if n.endswith("_quantizer")]
    layers = quantized_layers(model)
    return sum(n.rpartition(".")[0] not in layers or n.endswith("output_quantizer") for n in names)


def assert_trains(model: nn.Module, x: Tensor) -> None:
    model.train()
    sum(y.square().mean() for y in tensors(model(x))).backward()
    weights = {n: layer.weight.grad for n, layer in quantized_layers(model).items()}
    assert all(g is not None and g.isfinite().all() for g in weights.values())
    assert any(g.abs().sum() > 0 for g in weights.values())
