"""Pictures of ranges show the model's ranges and the measured distributions."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

import lq
from lq.data import DigitsDataModule
from lq.distribution import TensorHistogram
from lq.models import digits_cnn
from lq.plots import plot_histogram, plot_ranges
from lq.surgery import quantizers
from tests.plots.looking import overlapping


@pytest.fixture(scope="module")
def batches() -> list:
    data = DigitsDataModule()
    data.setup("fit")
    return list(data.calibration_dataloader())[:2]


@pytest.fixture(scope="module")
def model(batches) -> nn.Module:
    torch.manual_seed(0)
    return lq.calibrate(lq.quantize(digits_cnn(), "tensorrt_int8"), batches, progress=False)


def names(axes) -> list[str]:
    return [label.get_text() for label in axes.get_yticklabels()]


def test_points_and_spans_are_the_models_ranges(model) -> None:
    axes = plot_ranges(model).axes[0]
    found = {name: q.amax for name, q in quantizers(model).items()}
    points, rows = axes.get_lines()[0], names(axes)
    for x, y in zip(points.get_xdata(), points.get_ydata(), strict=True):
        assert x == found[f"{rows[y]}.input_quantizer"].item()
    for (low, y), (high, _) in axes.collections[0].get_segments():
        amax = found[f"{rows[int(y)]}.weight_quantizer"]
        assert (low, high) == (amax.min().item(), amax.max().item())
    assert len(points.get_xdata()) == len(axes.collections[0].get_segments()) == len(rows) == 5


def test_largest_ranges_alone() -> None:
    ranges = {
        f"{n}.input_quantizer": value for n, value in zip("abc", (1.0, 3.0, 2.0), strict=True)
    }
    assert names(plot_ranges(ranges, top=2).axes[0]) == ["b", "c"]
    assert names(plot_ranges(ranges).axes[0]) == ["a", "b", "c"]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_labels_overlap(model, theme: str) -> None:
    large = lq.quantize(timm.create_model("efficientnet_b0"), "tensorrt_int8")
    for i, quantizer in enumerate(quantizers(large).values()):
        quantizer.amax = torch.full_like(quantizer.scale, 1.1 ** (i % 40))
    for each in (model, large):
        assert not overlapping(plot_ranges(each, theme=theme))
    narrow = {"a.input_quantizer": 1.0, "b.input_quantizer": 1.4}
    assert not overlapping(plot_ranges(narrow, theme=theme))


def test_histogram_is_that_of_the_inputs(model, batches) -> None:
    seen = []
    layer = model.get_submodule("3.conv2")
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().flatten()))
    before = {name: q.amax.clone() for name, q in quantizers(model).items()}
    found = lq.tensor_histograms(model, batches, ["3.conv2.input_quantizer"])
    hook.remove()
    (histogram,) = found.values()
    values = torch.cat(seen).numpy()
    edges = np.linspace(0, values.max(), 129)
    np.testing.assert_allclose(histogram.edges, edges)
    assert sum(histogram.counts) == pytest.approx(values.size)
    # Within a fine bin (0.8 % of the magnitude) values are taken to be spread evenly.
    expected = np.cumsum(np.histogram(values, edges)[0])
    assert np.abs(np.cumsum(histogram.counts) - expected).max() < 0.003 * values.size
    after = {name: q.amax for name, q in quantizers(model).items()}
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("calibrator", ["max", "percentile(99.999)", "entropy", "mse"])
def test_clips_are_what_calibrators_choose(model, batches, calibrator: str) -> None:
    found = lq.tensor_histograms(model, batches)
    other = lq.quantize(digits_cnn(), "tensorrt_int8")
    other.load_state_dict(model.state_dict())
    lq.calibrate(other, batches, calibrator, progress=False)
    for name, histogram in found.items():
        assert histogram.clips[calibrator] == pytest.approx(quantizers(other)[name].amax.item())
    assert len(found) == 5


def test_uncalibrated_stays_so(batches) -> None:
    model = lq.quantize(digits_cnn(), "tensorrt_int8")
    with pytest.raises(ValueError, match=r"did you mean '3\.conv2\.input_quantizer'"):
        lq.tensor_histograms(model, batches, ["3.conv2"])
    with pytest.raises(RuntimeError, match="no range is known"):
        plot_ranges(model)
    lq.tensor_histograms(model, batches)
    assert not any(q.is_calibrated for q in quantizers(model).values())


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_histogram_with_its_clips(model, batches, theme: str) -> None:
    (histogram,) = lq.tensor_histograms(model, batches, ["4.input_quantizer"]).values()
    assert TensorHistogram.from_dict(histogram.to_dict()) == histogram
    figure = plot_histogram(histogram, theme)
    axes = figure.axes[0]
    stairs = axes.patches[0].get_data()
    np.testing.assert_array_equal(stairs.values, histogram.counts)
    np.testing.assert_array_equal(stairs.edges, histogram.edges)
    lines = {line.get_label().split(":")[0]: list(line.get_xdata()) for line in axes.get_lines()}
    assert lines == {name: [amax, amax] for name, amax in histogram.clips.items()}
    assert not overlapping(figure)
