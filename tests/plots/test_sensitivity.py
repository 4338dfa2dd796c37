"""Pictures of sweeps show the numbers of the sweep."""

import math

import numpy as np
import pytest
import timm

from lq.plots import plot_sensitivity, plot_sensitivity_distribution, plot_sensitivity_heatmap
from lq.sensitivity import LayerSensitivity, Sensitivity, sensitivity_classes
from lq.surgery import quantizable_layers
from tests.plots.looking import bars, overlapping
from tests.plots.zoo import FORMATS, sweep_of

SMALL = [f"layer{i}" for i in range(5)]
PLOTS = [plot_sensitivity, plot_sensitivity_distribution, plot_sensitivity_heatmap]


@pytest.fixture(scope="module")
def many() -> list[str]:
    return list(quantizable_layers(timm.create_model("resnet101"))[0])


def sweep_with(costs: dict[str, float], **more) -> Sensitivity:
    rows = [LayerSensitivity(layer=k, format="int8", kl=v, **more) for k, v in costs.items()]
    units = {k: (k,) for k in costs}
    return Sensitivity(found=rows, units=units, formats=("int8",), method="exact", metric="kl", n=4)


@pytest.mark.parametrize("metric", ["kl", "top1", "sqnr"])
def test_bars_and_intervals_are_those_of_the_sweep(metric: str) -> None:
    found = sweep_of(SMALL, metric)
    axes = plot_sensitivity(found, "fp16").axes[0]
    ranked = found.ranked("fp16")
    assert bars(axes) == {i: row.value(metric) for i, row in enumerate(ranked)}
    assert [t.get_text() for t in axes.get_yticklabels()] == [row.layer for row in ranked]
    segments = axes.collections[0].get_segments()
    expected = [[(row.low, i), (row.high, i)] for i, row in enumerate(ranked)]
    np.testing.assert_array_equal(segments, expected)


def test_top_units_alone() -> None:
    found = sweep_of(SMALL)
    figure = plot_sensitivity(found, top=2)
    ranked = found.ranked()[:2]
    assert bars(figure.axes[0]) == {i: row.kl for i, row in enumerate(ranked)}
    assert "worst 2 of 5" in figure.axes[0].get_title()


def test_an_estimate_has_no_intervals() -> None:
    axes = plot_sensitivity(sweep_with({"a": 0.5, "b": 0.25})).axes[0]
    assert bars(axes) == {0: 0.5, 1: 0.25}
    assert len(axes.collections[0].get_segments()) == 0


def test_distribution_is_the_cumulative_one() -> None:
    found = sweep_of(SMALL)
    lines = plot_sensitivity_distribution(found).axes[0].get_lines()
    for line, format in zip(lines, FORMATS, strict=True):
        costs = [row.kl for row in found if row.format == format]
        for x, share in zip(line.get_xdata(), line.get_ydata(), strict=True):
            assert share == np.mean(np.array(costs) <= x)
    assert lines[0].axes.get_xscale() == "log"


def test_heatmap_is_the_table_of_costs() -> None:
    found = sweep_of(SMALL, "sqnr")
    axes = plot_sensitivity_heatmap(found).axes[0]
    expected = [[found.score(unit, format) for format in FORMATS] for unit in SMALL]
    np.testing.assert_array_equal(axes.images[0].get_array(), expected)
    assert [t.get_text() for t in axes.texts] == [f"{c:.2g}" for row in expected for c in row]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("plot", PLOTS, ids=lambda f: f.__name__)
def test_no_labels_overlap_with_many_layers(plot, theme: str, many) -> None:
    assert len(many) > 100
    assert not overlapping(plot(sweep_of(many), theme=theme))
    assert not overlapping(plot(sweep_of(SMALL), theme=theme))


def test_classes_by_their_share_of_the_cost() -> None:
    costs = {"a": 1.0, "b": 30.0, "c": 9.0, "d": 25.0, "e": 35.0}
    expected = {"a": "low", "b": "high", "c": "low", "d": "medium", "e": "high"}
    assert sensitivity_classes(sweep_with(costs)) == expected
    # Brute force: no fewer units cause half of the cost, and no more stay within a tenth.
    assert 35 < 50 <= 35 + 30
    assert 1 + 9 <= 10 < 1 + 9 + 25


def test_classes_of_noise_of_gains_and_of_overflow() -> None:
    assert set(sensitivity_classes(sweep_with({"a": 1.0, "b": 2.0}, noise=True)).values()) == {
        "low"
    }
    found = sensitivity_classes(sweep_with({"a": 0.0, "b": -0.5}))
    assert found == {"a": "low", "b": "low"}
    found = sensitivity_classes(sweep_with({"a": math.inf, "b": 2.0, "c": 0.1}))
    assert found == {"a": "high", "b": "high", "c": "low"}


def test_what_was_not_swept() -> None:
    with pytest.raises(ValueError, match="got 'fp61'; did you mean 'fp16'"):
        plot_sensitivity(sweep_of(SMALL), "fp61")
    with pytest.raises(ValueError, match="`top` to be at least 1, but got 0"):
        plot_sensitivity(sweep_of(SMALL), top=0)


@pytest.mark.parametrize("plot", PLOTS, ids=lambda f: f.__name__)
def test_parts_alone(plot) -> None:
    with pytest.raises(ValueError, match="but got weights alone; sweep them with parts"):
        plot(sweep_with({"a": 0.5}, part="weights"))


def test_more_formats_and_layers_than_fit_one_page() -> None:
    formats = ("int2", "int3", "int4", "int5", "int6", "int8", "fp8_e4m3", "bf16", "fp16")
    for units in (SMALL, [f"layers.{i}.attention.projection" for i in range(400)]):
        figure = plot_sensitivity_heatmap(sweep_of(units, formats=formats))
        assert not overlapping(figure)
        assert len(figure.axes[0].texts) in (0, len(units) * len(formats))
