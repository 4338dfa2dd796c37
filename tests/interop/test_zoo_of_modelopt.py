"""The models of the zoo, quantized by nvidia-modelopt, brought along, and exported by us."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import lq
from lq.batches import tensors
from lq.functional import sqnr_db
from lq.interop import from_modelopt, not_converted
from lq.models import resnet20, resnet56
from lq.state import recipe_of
from lq.surgery import quantized_layers, quantizers
from tests.test_models import cifar10_test_images
from tests.test_zoo import CASES, EXPLAINED, added, images

mtq = pytest.importorskip("modelopt.torch.quantization")
BY_DEFAULT = ("mobilenet_v2", "densenet")
# It quantizes no additions and what pools read rather than what is concatenated, which no export
# of the same quantizers can do otherwise.
FINDINGS = {*EXPLAINED, "residual", "concat", "float-island"}
FADING = (
    "mobilenet_v2-whole",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "deeplabv3_mobilenet",
)
"""Models in which, with random weights, all signals fade to zero, which nvidia-modelopt divides
by; BatchNorm of the pictures at hand keeps signals up, and whatever differs."""


def pictures(size: int, count: int) -> Tensor:
    """Mixtures of two pictures and noise, so that models with random weights tell them apart."""
    near, far = images(size)
    share = torch.linspace(0, 1, count)[:, None, None, None]
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(2))
    return near * share + far * (1 - share) + 0.3 * noise


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [y.float() for y in tensors(model(x))]


def settle(model: nn.Module, x: Tensor) -> None:
    """Give BatchNorm the statistics of the pictures, so that nothing fades on its way."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        model(x)
    model.eval()


@contextmanager
def recorded(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """Record what the layers that nvidia-modelopt quantizes read and return."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        seen[name] = args[0].clone(), output.clone()

    layers = {n: m for n, m in model.named_modules() if hasattr(m, "weight_quantizer")}
    hooks = [m.register_forward_hook(partial(note, n)) for n, m in layers.items()]
    yield seen
    for hook in hooks:
        hook.remove()


def agreement(a: Tensor, b: Tensor) -> float:
    return (a.argmax(1) == b.argmax(1)).float().mean().item()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n not in BY_DEFAULT)) for n in CASES],
)
def test_brought_along_and_exported(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model, x = case.make().eval(), pictures(case.image, 16)
    if name in FADING:
        settle(model, x)
    floats = outputs(model, x)
    config = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
    mtq.quantize(model, config, lambda m: m(x))
    with recorded(model) as seen:
        theirs = outputs(model, x)

    from_modelopt(model)

    mine = outputs(model, x)
    # Of the same input each layer makes the same, but for a few ties of rounding.
    layers = {n: layer for n, layer in quantized_layers(model).items() if n in seen}
    ratios = [sqnr_db(seen[n][1], outputs(layer, seen[n][0])[0]) for n, layer in layers.items()]
    assert min(ratios) > 60
    noise = min(sqnr_db(a, b) for a, b in zip(floats, theirs, strict=True))
    closeness = min(sqnr_db(a, b) for a, b in zip(theirs, mine, strict=True))
    report = lq.export_onnx(model, x, tmp_path / "m.onnx")
    assert report.max_code_difference <= 1
    found = {f.rule for f in lq.lint(tmp_path / "m.onnx")}
    assert found <= FINDINGS
    runner = lq.open_engine(tmp_path / "m.onnx")
    exported = [y.float() for y in runner.run(x)]
    agreed = [agreement(a, b) for a, b in zip(theirs, exported, strict=True)]
    to_float = [
        (agreement(f, t), agreement(f, e)) for f, t, e in zip(floats, theirs, exported, strict=True)
    ]
    print(
        f"{name}: layers {min(ratios):.1f} dB, all {closeness:.1f} dB, theirs to float "
        f"{noise:.1f} dB; top-1 like theirs {agreed}; "
        f"like float (theirs, ours) {to_float}; lint {sorted(found)}; named {not_converted(model)}"
    )
    assert closeness >= noise - 1
    assert min(agreed) > 0.9 or name in FADING
    limit = 0.2 if name in FADING else 1 / 16
    assert all(abs(a - b) <= limit for a, b in to_float)


@pytest.mark.filterwarnings("ignore")
def test_additions_can_be_quantized_afterwards(tmp_path) -> None:
    case = CASES["mobilenet_v2"]
    model, x = case.make().eval(), pictures(case.image, 16)
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda m: m(x))
    from_modelopt(model)
    theirs = {n: q.amax.clone() for n, q in quantizers(model).items()}
    lq.quantize(model, dataclasses.replace(recipe_of(model), residual="shortcut"))
    lq.calibrate(model, [x], progress=False)
    mine = {n: q.amax for n, q in quantizers(model).items()}
    assert added(model) == case.additions
    for name in theirs.keys() & mine.keys():  # behind them, what is quantized differs a little
        torch.testing.assert_close(mine[name], theirs[name], rtol=0.1, atol=0)
    lq.export_onnx(model, x, tmp_path / "m.onnx")
    assert {f.rule for f in lq.lint(tmp_path / "m.onnx")} <= {"small-gemm"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("factory", "count"),
    [
        pytest.param(resnet20, 500, id="resnet20"),
        pytest.param(resnet56, 1000, id="resnet56", marks=pytest.mark.slow),
    ],
)
def test_real_weights_on_real_images(shared_data, tmp_path, factory, count) -> None:
    model = factory().eval()
    name = factory.__name__
    model.load_state_dict(load_file(shared_data / f"weights/{name}_cifar10.safetensors"))
    images, labels = cifar10_test_images(shared_data)
    calibration, x, target = images[-256:], images[:count], labels[:count]
    (floats,) = outputs(model, x)
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda m: m(calibration))
    (theirs,) = outputs(model, x)

    from_modelopt(model)

    lq.export_onnx(model, calibration[:64], tmp_path / "m.onnx")
    (ours,) = lq.open_engine(tmp_path / "m.onnx").run(x)
    correct = [(y.argmax(1) == target).float().mean().item() for y in (floats, theirs, ours)]
    like_float = agreement(floats, theirs), agreement(floats, ours)
    print(f"{name}: top-1 float, theirs, ours {correct}; like float (theirs, ours) {like_float}; "
          f"like theirs {agreement(theirs, ours)}")  # fmt: skip
    assert correct[0] > 0.9
    assert abs(correct[1] - correct[2]) <= 0.004
    assert abs(like_float[0] - like_float[1]) <= 0.006
    assert agreement(theirs, ours) >= 0.985
    assert {f.rule for f in lq.lint(tmp_path / "m.onnx")} <= FINDINGS
