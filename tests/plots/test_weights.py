"""The picture of a rounded weight shows what rounding did to it."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import lq
from lq.plots import plot_rounding, plot_weight_error
from lq.rounding import WeightError
from lq.spec import QuantSpec
from tests.plots.looking import overlapping

FP16 = lq.Recipe(QuantSpec("fp16"), QuantSpec("fp16"))
INT8 = QuantSpec("int8", axis=0, narrow=True)


def test_error_against_torchs_own_operator() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 4, 3, 3)
    found = lq.weight_error(weight, INT8)
    scale = weight.abs().amax((1, 2, 3)) / 127
    zero = torch.zeros(6, dtype=torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(weight, scale, zero, 0, -127, 127)
    signal, noise = weight.numpy() ** 2, (weight - rounded).numpy() ** 2
    by_channel = 10 * np.log10(signal.sum((1, 2, 3)) / noise.sum((1, 2, 3)))
    np.testing.assert_allclose(found.channel_sqnr_db, by_channel, rtol=1e-4)
    assert found.sqnr_db == pytest.approx(10 * np.log10(signal.sum() / noise.sum()), rel=1e-4)
    codes = np.round((rounded / scale.view(-1, 1, 1, 1)).numpy())
    values, counts = np.unique(codes, return_counts=True)
    np.testing.assert_array_equal(found.codes, values)
    np.testing.assert_array_equal(found.code_counts, counts)
    for counted in (found.before, found.errors):
        assert sum(counted) == weight.numel()
    assert (found.error_edges[0], found.error_edges[-1]) == pytest.approx((-0.5, 0.5))


def test_of_a_layer_with_its_own_ranges() -> None:
    torch.manual_seed(0)
    model = lq.quantize(
        nn.Sequential(nn.ConvTranspose2d(3, 5, 2), nn.Linear(4, 4)), "tensorrt_int8"
    )
    with pytest.raises(RuntimeError, match=r"'0\.weight_quantizer' is not calibrated"):
        lq.weight_error(model[0])
    layer = model[0]
    layer.weight_quantizer.amax = layer.weight.detach().abs().amax((0, 2, 3)) / 2
    found = lq.weight_error(layer)
    assert found.name == "0"
    assert len(found.channel_sqnr_db) == 5
    error = layer.weight - layer.weight_quantizer(layer.weight)
    worst = (error.abs() / layer.weight_quantizer.scale.view(1, -1, 1, 1)).max().item()
    assert found.error_edges[-1] == pytest.approx(worst)
    assert worst > 60  # half of the range is clipped


@pytest.mark.parametrize(
    "layer",
    [
        pytest.param(lambda: nn.Linear(2, 2), id="float"),
        pytest.param(lambda: lq.quantize(nn.Linear(2, 2), FP16), id="fp16"),
    ],
)
def test_layers_without_codes(layer) -> None:
    with pytest.raises(ValueError, match="whose weights have codes, but got"):
        lq.weight_error(layer())
    with pytest.raises(ValueError, match="with a scale"):
        lq.weight_error(torch.ones(2, 2), QuantSpec("fp16"))


def test_json_and_back_with_a_channel_that_loses_nothing() -> None:
    found = lq.weight_error(torch.tensor([[127.0, 3.0], [1.0, 0.3]]), INT8, "fc")
    assert found.channel_sqnr_db[0] == math.inf
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert WeightError.from_dict(plain) == found


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("format", ["int3", "int8", "fp8_e4m3"])
def test_panels_show_what_was_measured(format: str, theme: str) -> None:
    torch.manual_seed(0)
    spec = QuantSpec(format, axis=0, narrow=True)
    found = lq.weight_error(torch.randn(300, 64), spec, "features.17.conv")
    figure = plot_weight_error(found, theme)
    before, after, errors, channels = figure.axes
    np.testing.assert_array_equal(before.patches[0].get_data().values, found.before)
    np.testing.assert_array_equal(errors.patches[0].get_data().values, found.errors)
    segments = np.array(after.collections[0].get_segments())
    np.testing.assert_array_equal(
        segments[:, 1], [*zip(found.codes, found.code_counts, strict=True)]
    )
    np.testing.assert_array_equal(channels.get_lines()[0].get_ydata(), found.channel_sqnr_db)
    assert not overlapping(figure)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_rounding_is_torchs(theme: str) -> None:
    figure = plot_rounding(QuantSpec("int4"), 2.0, theme)
    left, right = figure.axes
    x, y = left.get_lines()[1].get_data()
    expected = torch.fake_quantize_per_tensor_affine(torch.as_tensor(x), 2 / 7, 0, -8, 7)
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(right.get_lines()[0].get_ydata(), y - x, atol=1e-6)
    assert not overlapping(figure)


def test_rounding_needs_a_grid() -> None:
    with pytest.raises(ValueError, match="a format with a scale, but got 'bf16'"):
        plot_rounding(QuantSpec("bf16"))
