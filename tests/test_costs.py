"""Costs of layers, against torch's own counting and exported files."""

from collections import OrderedDict

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lq
from lq.costs import Costs, LayerCost, count_costs
from lq.models import digits_cnn
from lq.modes import quantizer_mode
from lq.plan import PrecisionPlan


def shapes() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 16, 3, groups=4, dilation=2, bias=False),
        nn.ConvTranspose2d(16, 8, 3, stride=2, groups=2, output_padding=1),
        nn.Flatten(2),
        nn.Conv1d(8, 4, 5),
        nn.Linear(96, 10),
    )


def recurrent() -> nn.Module:
    shared = nn.Linear(8, 8)
    return nn.Sequential(shared, nn.ReLU(), shared)


@pytest.mark.parametrize(
    ("factory", "shape"),
    [
        pytest.param(shapes, (2, 3, 16, 16), id="every kind"),
        pytest.param(digits_cnn, (3, 1, 8, 8), id="digits_cnn"),
        pytest.param(recurrent, (4, 8), id="called twice"),
        pytest.param(torchvision.models.mobilenet_v2, (2, 3, 64, 64), id="mobilenet_v2"),
    ],
)
def test_macs_are_half_of_what_torch_counts(factory, shape) -> None:
    model, x = factory().eval(), torch.randn(shape)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    counted = count_costs(model, x)
    assert 2 * len(x) * sum(c.macs for c in counted.layers.values()) == counter.get_total_flops()


def test_attention_counts_its_projections() -> None:
    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=4).eval()
    x = torch.randn(2, 3, 16, 16)
    floats = count_costs(model, x)
    lq.quantize(model, "tensorrt_int8")  # whose attention calls its output projection
    assert count_costs(model, x) == floats
    with (
        torch.no_grad(),
        quantizer_mode(model, lq.Mode.BYPASS),
        FlopCounterMode(display=False) as counter,
    ):
        model(x)
    flops = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in flops.items() if "bmm" not in str(op) and "sdpa" not in str(op))
    assert 2 * len(x) * sum(c.macs for c in floats.layers.values()) == products


def test_the_model_is_left_as_it_was() -> None:
    model = digits_cnn().train()
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [torch.randn(4, 1, 8, 8)], progress=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_costs(model, (torch.randn(4, 1, 8, 8), torch.zeros(4)))
    assert model.training
    assert all(q.mode is lq.Mode.QUANTIZE for q in lq.surgery.quantizers(model).values())
    torch.testing.assert_close(model.state_dict(), before, atol=0, rtol=0, equal_nan=True)
    assert not any(m._forward_hooks for m in model.modules())


def test_size_in_float_is_that_of_all_parameters() -> None:
    for factory, shape in ((digits_cnn, (2, 1, 8, 8)), (shapes, (2, 3, 16, 16))):
        model = factory()
        held = [t for t in [*model.parameters(), *model.buffers()] if t.is_floating_point()]
        size = count_costs(model, torch.randn(shape)).total("size_mb", {})
        assert size == pytest.approx(sum(4 * t.numel() for t in held) / 1e6)


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(8, 8), b=nn.Linear(8, 8)))
    model.b.weight = model.a.weight
    costs = count_costs(model, torch.randn(2, 8))
    assert [costs.layers[n].weights for n in "ab"] == [64, 0]
    assert costs.total("size_mb", {}) == (64 + 16) * 4 / 1e6


def test_tied_weights_in_two_formats_are_stored_twice() -> None:
    model = nn.Sequential(OrderedDict(a=nn.Linear(64, 64), b=nn.Linear(64, 64)))
    model.b.weight = model.a.weight
    costs = count_costs(model, torch.randn(2, 64))
    biases, wide, narrow = 2 * 64 * 4, 64 * 64 * 4, 64 * 64 + (64 + 1) * 4
    for plan, size in (
        ({}, wide),
        ({"a": "int8", "b": "int8"}, narrow),
        ({"a": "int8"}, wide + narrow),
        ({"b": "int8"}, wide + narrow),
    ):
        assert costs.total("size_mb", plan) == pytest.approx((biases + size) / 1e6)
    found = lq.sweep(model, [torch.randn(4, 64)], progress=False)
    assert found.units == {"a": ("a", "b")}


@pytest.mark.parametrize("skipped", [(), ("b",)])
def test_predicted_sizes_are_the_counted_ones_where_weights_are_tied(skipped) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict((n, nn.Linear(64, 64)) for n in "abc"))
    model.b.weight = model.a.weight
    recipe = lq.Recipe(rules=tuple(lq.Rule(name=n, format="skip") for n in skipped))
    found = lq.sweep(model, [torch.randn(8, 64)], ["int8", "int4"], recipe=recipe, progress=False)
    assert ("a" in found.units) == (not skipped)
    for plan in lq.pareto_front(found):
        assert plan.predicted.size_mb == pytest.approx(found.costs.total("size_mb", plan))


@pytest.mark.parametrize("format", ["int8", "int4", "fp16", "fp32"])
def test_size_is_that_of_the_file_less_its_graph(format, tmp_path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 256, 3), nn.Flatten())
    x = torch.randn(2, 3, 8, 8)
    costs = count_costs(model, x)
    plan = dict.fromkeys(costs.layers, format)
    lq.quantize(model, lq.Recipe.from_plan(plan, lq.Recipe(residual=None)))
    if format != "fp32":
        lq.calibrate(model, [x], progress=False)
    lq.export_onnx(model, x, tmp_path / "m.onnx")
    predicted = costs.total("size_mb", plan)
    assert (tmp_path / "m.onnx").stat().st_size / 1e6 == pytest.approx(predicted, abs=0.006)


def test_bit_operations() -> None:
    counted = LayerCost(weights=9, channels=1, biases=0, macs=100)
    expected = {
        "fp32": 1024,
        "fp16": 256,
        "int8": 64,
        "fp8_e4m3": 64,
        "int4": 128,
        "int8/fp32": 256,
    }
    assert {f: counted.bitops(f) / 100 for f in expected} == expected


def test_latency_that_was_not_measured() -> None:
    costs = count_costs(nn.Linear(2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="measured latency of layer '' in int8, but there is none"):
        costs.total("latency_ms", {"": "int8"})


def test_costs_as_plain_values() -> None:
    costs = count_costs(digits_cnn(), torch.zeros(1, 1, 8, 8))
    assert Costs.from_dict(costs.to_dict()) == costs
    assert set(costs.layers) == set(PrecisionPlan.of(digits_cnn()))
