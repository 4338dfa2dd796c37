from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from lq.calibrators import CALIBRATORS, COMPETITORS, parse_calibrators
from lq.calibrators.entropy import entropy_amax, entropy_bin
from lq.calibrators.maximum import max_amax
from lq.calibrators.mse import mse_amax, squared_errors, unit_levels
from lq.calibrators.percentile import percentile_amax
from lq.calibrators.weights import MSE_CANDIDATES, weight_max_amax, weight_mse_amax
from lq.histogram import Histogram, bin_edges, bin_index
from lq.observers import HistogramObserver, RangeObserver
from lq.spec import QuantSpec

INT8, UINT8, UINT3 = QuantSpec(), QuantSpec(signed=False), QuantSpec("int3", signed=False)


def observed(*tensors: Tensor) -> HistogramObserver:
    statistics = HistogramObserver("x", sample=None)
    for x in tensors:
        statistics.observe(x)
    return statistics


def samples(kind: str, n: int = 20011) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    normal, uniform = (f(n, generator=generator) for f in (torch.randn, torch.rand))
    return {
        "normal": normal,
        "relu": normal.relu() * 3,
        "relu6": (normal * 5).clamp(0, 6),
        "laplace": torch.sign(normal) * -torch.log(uniform + 1e-7),
        "heavy": normal**5,
        "sparse": uniform**8 * 5,
        "constant": torch.full((n,), 0.7),
    }[kind]


KINDS = ["normal", "relu", "relu6", "laplace", "heavy", "sparse", "constant"]


# --------------------------------------------------------------------------------- percentile


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [1.0, 50.0, 90.0, 99.0, 99.9, 99.99], ids=str)
def test_percentile_is_in_the_bin_of_numpys(kind: str, percentile: float) -> None:
    x = samples(kind)

    amax = percentile_amax(observed(x), INT8, percentile)

    exact = np.percentile(x.abs().numpy(), percentile, method="inverted_cdf")
    assert bin_index(amax) == bin_index(torch.tensor(exact)) or exact == 0
    assert 0 < amax <= x.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.99], ids=str)
def test_percentile_is_the_published_algorithms(kind: str, percentile: float) -> None:
    """pytorch-quantization's, on the same histogram; no share is reached to the last count."""
    statistics = observed(samples(kind))
    counts, edges = statistics.counts.numpy(), bin_edges().numpy()
    expected = edges[np.searchsorted(np.cumsum(counts / counts.sum()), percentile / 100)]

    amax = percentile_amax(statistics, INT8, percentile).item()

    assert amax == (np.float32(expected) if expected > 0 else statistics.amax)


def test_all_of_it_is_the_largest() -> None:
    statistics = observed(samples("normal"))

    assert percentile_amax(statistics, INT8, 100).item() == statistics.amax.item()


def test_percentile_of_many_values_is_exact() -> None:
    statistics = observed(torch.linspace(1, 1.99, 101))
    statistics.counts[0] = 10**12 - 101

    # All but 1 in 10^12 values lie below the largest.
    amax = percentile_amax(statistics, INT8, 100 * (1 - 1e-12))

    assert bin_index(amax) == bin_index(torch.tensor(1.99)) - 1


# -------------------------------------------------------------------------------------- mse


def numpy_squared_error(x: np.ndarray, amax: float, levels: np.ndarray) -> float:
    levels = amax * levels
    nearest = np.abs(x[:, None] - levels).argmin(1)
    return float(((x - levels[nearest]) ** 2).sum())


@pytest.mark.parametrize("spec", [INT8, QuantSpec("int4"), UINT3], ids=str)
@pytest.mark.parametrize("kind", ["normal", "relu6", "heavy"])
def test_squared_errors_are_numpys(kind: str, spec: QuantSpec) -> None:
    """Values spread evenly within their bins are those that the histogram stands for."""
    histogram = observed(samples(kind, 4000)).histogram
    filled = (histogram.counts > 0).nonzero().flatten()
    steps = (np.arange(50) + 0.5) / 50
    values, weights = [], []
    for i in filled.tolist():
        left, right = histogram.edges[i].item(), histogram.edges[i + 1].item()
        values.append(left + (right - left) * steps)
        weights.append(histogram.counts[i].item() / 50)
    levels = unit_levels(spec).numpy()
    candidates = torch.tensor([0.3, 0.8, 1.0]).double() * histogram.amax

    found = squared_errors(histogram, candidates, unit_levels(spec))

    for amax, error in zip(candidates.tolist(), found.tolist(), strict=True):
        expected = sum(
            w * numpy_squared_error(v, amax, levels) for v, w in zip(values, weights, strict=True)
        )
        assert error == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("spec", [INT8, QuantSpec("int4"), QuantSpec("fp8_e4m3")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_the_brute_force_optimum(kind: str, spec: QuantSpec) -> None:
    x = samples(kind, 5000)
    statistics = observed(x)

    amax = mse_amax(statistics, spec).item()

    values, levels = x.abs().double().numpy(), unit_levels(spec).numpy()
    best = min(
        numpy_squared_error(values, ratio * values.max(), levels)
        for ratio in np.linspace(0.02, 1, 150)
    )
    assert numpy_squared_error(values, amax, levels) <= best * 1.05 + 1e-4 * (kind == "constant")


def test_every_edge_was_considered() -> None:
    histogram = observed(samples("laplace")).histogram
    levels = unit_levels(QuantSpec("int4"))

    amax = mse_amax(observed(samples("laplace")), QuantSpec("int4")).double().view(1)

    edges = histogram.edges[(histogram.edges > 0.05)]
    errors = squared_errors(histogram, edges, levels)
    assert squared_errors(histogram, amax, levels).item() == pytest.approx(errors.min().item())


def test_levels_of_fp8_are_torchs() -> None:
    levels = unit_levels(QuantSpec("fp8_e4m3")) * 448

    assert torch.equal(levels.to(torch.float8_e4m3fn).double(), levels)
    assert len(levels) == 127
    assert levels[-1] == 448
    assert levels.diff().min() > 0


# ---------------------------------------------------------------------------------- entropy


def published_entropy_bin(counts: np.ndarray, levels: int, start: int) -> int:
    """pytorch-quantization's algorithm, in its own order of steps."""
    bins = counts.astype(np.float64).copy()
    bins[0] = bins[1]
    divergences = []
    for i in range(start, len(bins) + 1):
        level = np.digitize(range(i), np.linspace(0, i, num=levels + 1)) - 1
        level[bins[:i] == 0] = -1
        sums = np.zeros(levels)
        for j, g in enumerate(level):
            if g != -1:
                sums[g] += bins[j]
        for g, filled in Counter(level).items():
            if g != -1:
                sums[g] /= filled
        q = np.array([sums[g] if g != -1 else 0.0 for g in level])
        p = bins[:i].copy()
        p[-1] += bins[i:].sum()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            divergences.append(scipy.stats.entropy(p, q))
    divergences = np.nan_to_num(divergences, nan=np.inf)
    return start + len(divergences) - 1 - int(np.argmin(divergences[::-1]))


@pytest.mark.parametrize("spec", [INT8, UINT8, QuantSpec("int4")], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_entropy_is_the_published_algorithms(kind: str, spec: QuantSpec) -> None:
    x = samples(kind).abs().numpy()
    counts = np.histogram(x, bins=300, range=(0, x.max()))[0]
    levels = 1 << (spec.number_format.bits - spec.signed)

    found = entropy_bin(torch.from_numpy(counts), levels)

    assert found == published_entropy_bin(counts, levels, 128)


def test_entropy_is_modelopts() -> None:
    histogram = pytest.importorskip("modelopt.torch.quantization.calib.histogram")
    x = samples("laplace").abs().numpy()
    counts, edges = np.histogram(x, bins=400, range=(0, x.max()))

    expected = histogram._compute_amax_entropy(counts.copy(), edges, 8, False)

    assert edges[entropy_bin(torch.from_numpy(counts), 128)] == pytest.approx(expected.item())


def test_entropy_of_other_formats_is_the_largest() -> None:
    statistics = observed(samples("laplace"))

    assert entropy_amax(statistics, QuantSpec("fp8_e4m3")).item() == statistics.amax.item()


# ------------------------------------------------------------------------ all, on hard inputs


@pytest.mark.parametrize("name", COMPETITORS)
@pytest.mark.parametrize(
    "x",
    [
        pytest.param(torch.zeros(100), id="zeros"),
        pytest.param(torch.full((100,), 1e-42), id="denormal"),
        pytest.param(torch.full((100,), 1e-25), id="tiny"),
        pytest.param(torch.full((100,), 3e38), id="nearly-infinite"),
        pytest.param(torch.tensor([0.5]), id="one-value"),
        pytest.param(torch.cat([torch.zeros(9999), torch.rand(1)]), id="hardly-fires"),
        pytest.param(-torch.rand(1000), id="negative"),
    ],
)
def test_ranges_are_finite_and_within_what_was_seen(name: str, x: Tensor) -> None:
    (calibrator,) = parse_calibrators(name)

    amax = calibrator.amax(observed(x), INT8)

    assert amax.isfinite()
    assert amax.shape == ()
    assert amax.dtype is torch.float32
    assert 0.9 * x.abs().min() <= amax <= x.abs().max()
    assert amax > 0 or x.abs().max() == 0


@pytest.mark.parametrize("name", ["percentile", "entropy"])
@pytest.mark.parametrize("first", [True, False], ids=["outlier-first", "outlier-last"])
def test_one_huge_outlier_does_not_blur_the_rest(name: str, first: bool) -> None:
    x, outlier = samples("relu", 50000), torch.tensor([1e30])
    (calibrator,) = parse_calibrators(name)

    amax = calibrator.amax(observed(*([outlier, x] if first else [x, outlier])), INT8).item()

    assert amax == pytest.approx(calibrator.amax(observed(x), INT8).item(), rel=0.1)


# ------------------------------------------------------------------------------------- names


def test_max_is_the_largest() -> None:
    assert max_amax(observed(samples("normal")), INT8) == samples("normal").abs().max()


@pytest.mark.parametrize(
    ("name", "observer"),
    [
        ("max", RangeObserver),
        ("percentile", HistogramObserver),
        ("percentile(99.9)", HistogramObserver),
        ("percentile(100)", HistogramObserver),
        ("entropy", HistogramObserver),
        ("mse", HistogramObserver),
    ],
    ids=str,
)
def test_calibrators_by_name(name: str, observer: type[RangeObserver]) -> None:
    (calibrator,) = parse_calibrators(name)

    assert calibrator.name == name
    assert calibrator.observer is observer


def test_auto_is_all_of_them() -> None:
    assert {c.name for c in parse_calibrators("auto")} >= set(CALIBRATORS)


def test_the_percentile_in_the_name_counts() -> None:
    statistics = observed(torch.rand(10000, generator=torch.Generator().manual_seed(0)))

    (median,), (default,) = parse_calibrators("percentile(50)"), parse_calibrators("percentile")

    assert median.amax(statistics, INT8).item() == pytest.approx(0.5, abs=0.03)
    expected = percentile_amax(statistics, INT8, 99.99)
    assert default.amax(statistics, INT8).item() == expected.item()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("maxx", "'maxx'.*did you mean 'max'", id="max"),
        pytest.param("percentil", "'percentil'.*did you mean 'percentile'", id="percentile"),
        pytest.param("percentile(0)", r"\(0, 100\].*'percentile\(0\)'", id="zero"),
        pytest.param("percentile(101)", r"\(0, 100\].*'percentile\(101\)'", id="above-100"),
        pytest.param("percentile()", r"`calibrator`.*'percentile\(\)'", id="no-number"),
        pytest.param("percentile(9.9.9)", r"'percentile\(9\.9\.9\)'", id="no-number-either"),
        pytest.param("percentile(-1)", r"'percentile\(-1\)'", id="negative"),
        pytest.param("", "`calibrator`.*''", id="empty"),
        pytest.param(None, "`calibrator`.*None", id="none"),
    ],
)
def test_unknown_calibrators(name: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_calibrators(name)


# ----------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("axis", [None, 0, 1, 3], ids=lambda axis: f"axis={axis}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_weight_max_is_numpys(axis: int | None, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 3, 2, 5, requires_grad=True).to(dtype)
    others = None if axis is None else tuple(i for i in range(4) if i != axis)

    amax = weight_max_amax(weight, QuantSpec(axis=axis))

    expected = np.abs(weight.detach().float().numpy()).max(others)
    assert amax.dtype is torch.float32
    np.testing.assert_array_equal(amax.numpy(), expected)


@pytest.mark.parametrize("format", ["int8", "int4", "int2", "fp8_e4m3"])
@pytest.mark.parametrize("axis", [None, 0, 1], ids=lambda axis: f"axis={axis}")
def test_weight_mse_is_the_brute_force_optimum(axis: int | None, format: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, 3, 3, generator=generator) ** 3
    spec = QuantSpec(format, axis=axis, narrow=True)

    amax = weight_mse_amax(weight, spec)

    values = weight.double().numpy()
    rows = values.reshape(1, -1) if axis is None else np.moveaxis(values, axis, 0)
    rows = np.abs(rows.reshape(len(rows), -1))
    levels = unit_levels(spec).numpy()
    assert amax.shape == (() if axis is None else (len(rows),))
    for row, found in zip(rows, amax.view(-1).tolist(), strict=True):
        candidates = np.linspace(0.25, 1, MSE_CANDIDATES) * row.max()
        best = min(numpy_squared_error(row, a, levels) for a in candidates)
        assert numpy_squared_error(row, found, levels) == pytest.approx(best, rel=1e-4)


def test_weights_of_zeros_get_a_range_of_zero() -> None:
    assert weight_mse_amax(torch.zeros(2, 3), QuantSpec(axis=0)).tolist() == [0, 0]


def test_a_histogram_of_nothing_but_zeros_has_no_error() -> None:
    histogram = Histogram(observed(torch.zeros(5)).counts, torch.tensor(0.0))

    assert squared_errors(histogram, torch.tensor([1.0]).double(), unit_levels(INT8)).item() == 0
