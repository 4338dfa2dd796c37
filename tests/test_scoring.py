"""The error that a range causes at a layer's output, against plain torch."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lq
from lq.collector import RangeCollector
from lq.functional import fake_quantize
from lq.modes import set_mode
from lq.surgery import quantizers
from tests.test_ranges import relative_error


def scored(model: nn.Module, x: Tensor, training: bool = False) -> dict[str, dict[str, float]]:
    """Errors by quantizer and calibrator, found while the model runs in the mode told."""
    collector = RangeCollector(model.train(training), "auto")
    with torch.no_grad():
        collector.start()
        model(x)
        collector.start_scoring()
        model(x)
    return {name: dict(found.errors) for name, found in collector.finish().found.items()}


def test_errors_beside_an_outlier_whose_square_is_beyond_float32() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(3, 4, 3), torch.randn(8, 3, 16, 16)
    x[0, 0, 0, 0] = 1e30
    model = lq.quantize(nn.Sequential(layer), "tensorrt_int8")

    ranges = lq.find_ranges(model, [x], "auto", progress=False)

    for found in ranges.found.values():
        assert all(math.isfinite(error) for error in found.errors.values())
    weight = ranges.found["0.weight_quantizer"].amax
    plain = lq.dequantize(model)[0].requires_grad_(False)
    error = fake_quantize(plain.weight, weight / 127, -127, 127, 0) - plain.weight
    noise = nn.functional.conv2d(x.double(), error.double()).square().sum()
    noise /= plain.double()(x.double()).square().sum()
    assert ranges.found["0.weight_quantizer"].errors["max"] == pytest.approx(float(noise), rel=1e-3)


class Residual(nn.Module):
    """A shortcut that no layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.act(x) + self.second(x)


def test_what_feeds_no_layer_is_judged_by_its_own_output() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    model = lq.quantize(Residual(), {"inputs": "int4"})
    inputs = {"first.input_quantizer", "second.input_quantizer"}
    weights = {"first.weight_quantizer", "second.weight_quantizer"}
    (residual,) = quantizers(model).keys() - inputs - weights

    found = lq.find_ranges(model, [x], "auto", progress=False).found[residual]
    alone = lq.find_ranges(model, [x], "entropy", progress=False).found[residual]

    plain = lq.dequantize(model)
    shortcut = plain.act(plain.first(x)).detach()
    amax = {found.calibrator: found.amax, "entropy": alone.amax}
    for calibrator, value in amax.items():
        # All 40 samples calibrate, the first 16 are tried.
        expected = relative_error(nn.Identity(), value, [shortcut[:16]], 7)
        assert found.errors[calibrator] == pytest.approx(expected, rel=1e-4)


class SelfAttention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def attention(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    return lq.quantize(SelfAttention(dropout), {"inputs": "int4"})


def test_attention_is_scored_and_the_layer_within_it_once() -> None:
    x = torch.randn(5, 7, 8, generator=torch.Generator().manual_seed(1))
    model, seen = attention(), []
    set_mode(model, lq.Mode.BYPASS)
    hook = model.attention.out_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model.eval()(x)
    hook.remove()

    errors = scored(model, x)

    ranges = lq.find_ranges(model, [x], "max", progress=False).found
    plain = lq.dequantize(model).eval()
    for name, layer, inputs in (
        ("attention.input_quantizer", plain, [x]),
        ("attention.out_proj.input_quantizer", plain.attention.out_proj, seen),
    ):
        expected = relative_error(layer, ranges[name].amax, inputs, 7)
        assert errors[name]["max"] == pytest.approx(expected, rel=1e-4)


def test_dropout_is_no_error() -> None:
    x = torch.randn(5, 7, 8, generator=torch.Generator().manual_seed(1))
    without, dropped = scored(attention(), x), scored(attention(dropout=0.5), x, training=True)
    for name in ("attention.input_quantizer", "attention.weight_quantizer"):
        assert dropped[name] == pytest.approx(without[name])


def test_hooks_of_the_user_are_left_out() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))

    def errors(hook: bool) -> dict[str, dict[str, float]]:
        torch.manual_seed(0)
        model = lq.quantize(nn.Sequential(nn.Linear(4, 3)), "tensorrt_int8")
        if hook:
            model[0].register_forward_hook(lambda _module, _args, output: output * 3)
        return scored(model, x)

    assert errors(hook=True) == errors(hook=False)


class Weighted(nn.Module):
    """An input that holds no samples, and one that is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return self.layer(x.mul_(0.5)) * weights


def test_inputs_that_are_no_samples_and_inputs_that_are_changed(tmp_path: Path) -> None:
    def batches() -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(32, 20, 4, generator=generator)
        return [{"x": x, "weights": torch.rand(20, 1, generator=generator)}]

    def model() -> nn.Module:
        torch.manual_seed(0)
        return lq.quantize(Weighted(), "tensorrt_int8")

    path = tmp_path / "ranges.json"
    made = lq.find_ranges(model(), batches(), "auto", progress=False, cache=path)
    again = lq.find_ranges(model(), batches(), "auto", progress=False, cache=path)
    assert again.table() == made.table()
