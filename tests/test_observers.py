from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lq.histogram import BINS, Histogram, bin_edges, bin_index
from lq.observers import BLOCK, HistogramObserver, RangeObserver, in_memory_order

OBSERVERS = pytest.mark.parametrize("observer", [RangeObserver, HistogramObserver])


def watched(observer: type[RangeObserver], *tensors: Tensor, **kwargs: int | None) -> RangeObserver:
    watching = observer("net.fc.input_quantizer", **kwargs)
    for x in tensors:
        watching.observe(x)
    return watching


def varied(seed: int = 0) -> list[Tensor]:
    """Batches of differing shape, magnitude and distribution."""
    torch.manual_seed(seed)
    return [
        torch.randn(4, 3, 5, 5) * 0.01,
        torch.rand(7) * 3,
        -torch.rand(2, 9).square() * 100,
        torch.randn(1, 1000).relu(),
        torch.randn(()),
    ]


def everything(tensors: list[Tensor]) -> np.ndarray:
    return np.concatenate([np.abs(x.float().numpy()).ravel() for x in tensors])


@OBSERVERS
def test_amax_is_numpys(observer: type[RangeObserver]) -> None:
    batches = varied()

    statistics = watched(observer, *batches)

    assert statistics.amax.item() == everything(batches).max()
    assert statistics.amax.shape == ()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@OBSERVERS
def test_16_bit_tensors(observer: type[RangeObserver], dtype: torch.dtype) -> None:
    batches = [x.to(dtype) for x in varied()]

    statistics = watched(observer, *batches)

    assert statistics.amax.dtype is torch.float32
    assert statistics.amax.item() == everything(batches).max()
    if observer is HistogramObserver:
        assert torch.equal(
            statistics.counts, watched(observer, *[x.float() for x in batches]).counts
        )


@OBSERVERS
def test_zeros_and_empty_tensors(observer: type[RangeObserver]) -> None:
    assert watched(observer, torch.zeros(0, 3)).amax is None
    assert watched(observer, torch.zeros(2, 3), torch.zeros(0)).amax.item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("size", [3, 3000], ids=["counted", "sampled"])
@OBSERVERS
def test_not_finite_names_layer_and_batch(
    observer: type[RangeObserver], size: int, value: float
) -> None:
    kwargs = {"sample": 1000} if observer is HistogramObserver else {}
    statistics = watched(observer, torch.ones(3), **kwargs)
    statistics.batch = 7
    x = torch.ones(size, 4)
    x[1, 1] = value

    with pytest.raises(RuntimeError, match=r"'net\.fc\.input_quantizer'.*NaN.*batch 7"):
        statistics.observe(x)
    assert statistics.amax.item() == 1


@OBSERVERS
def test_statistics_hold_no_graph(observer: type[RangeObserver]) -> None:
    statistics = watched(observer, torch.ones(3, requires_grad=True) * 2)

    assert not statistics.amax.requires_grad


def numpy_counts(values: np.ndarray) -> list[int]:
    """Bins are the numbers of 8 significant bits; numpy's own search in their edges."""
    found = np.searchsorted(bin_edges().numpy(), values.astype(np.float64), side="right") - 1
    return np.bincount(found.clip(0, BINS - 1), minlength=BINS).tolist()


@pytest.mark.parametrize(
    "batches",
    [
        pytest.param(varied(), id="varied"),
        pytest.param([torch.rand(500), 1e4 * torch.rand(300)], id="growth"),
        pytest.param([1e4 * torch.rand(500), torch.rand(300)], id="shrink"),
        pytest.param([torch.rand(500), torch.tensor([1e30])], id="outlier"),
        pytest.param([torch.tensor([0.5, 1.0, 2.0]), torch.tensor([4.0, 4096.0])], id="edges"),
        pytest.param([torch.zeros(50), -1e-3 * torch.rand(300)], id="zeros"),
        pytest.param([1e-30 * torch.rand(300), 1e-15 * torch.rand(50)], id="tiny"),
        pytest.param([torch.tensor([1e-45]), torch.tensor([1e-40])], id="denormal"),
        pytest.param([torch.rand(300), torch.tensor([3e38])], id="nearly-infinite"),
    ],
)
def test_histogram_of_parts_is_numpys_of_the_whole(batches: list[Tensor]) -> None:
    whole = watched(HistogramObserver, torch.cat([x.flatten() for x in batches]))
    parts = watched(HistogramObserver, *batches)
    reverse = watched(HistogramObserver, *batches[::-1])

    assert whole.counts.dtype is torch.int64
    assert whole.counts.tolist() == numpy_counts(everything(batches))
    for other in (parts, reverse):
        assert torch.equal(other.counts, whole.counts)
        assert torch.equal(other.amax, whole.amax)


def test_bins_are_as_narrow_as_told() -> None:
    edges = bin_edges()

    widths = (edges.diff() / edges[:-1])[1:]

    assert widths.max() <= 1 / 128
    assert torch.equal(bin_index(edges[:-1].float()), torch.arange(BINS, dtype=torch.int32))
    below = torch.nextafter(edges[1:-1].float(), torch.tensor(0.0))
    assert torch.equal(bin_index(below), torch.arange(BINS - 1, dtype=torch.int32))


def test_memory_is_constant() -> None:
    statistics = watched(HistogramObserver, *varied(), torch.tensor([1e20]), torch.randn(10000))

    tensors = [v for v in vars(statistics).values() if isinstance(v, Tensor)]

    assert sum(t.numel() for t in tensors) == BINS + 2


def test_what_several_layers_are_given_counts_once() -> None:
    x = torch.rand(100)
    statistics = watched(HistogramObserver, x, x)
    assert statistics.counts.sum() == 100

    statistics.observe(x.add_(1))  # changed in place
    statistics.observe(x.clone())
    assert statistics.counts.sum() == 300

    with torch.inference_mode():
        y = torch.rand(100)
        statistics.observe(y)
        statistics.observe(y.add_(1))
    assert statistics.counts.sum() == 500


# ------------------------------------------------------------------------------ sub-sampling


def activations(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator).relu() ** 1.5


def test_a_sample_has_the_whole_tail_and_the_shape_of_the_rest() -> None:
    x = activations(64, 16, 32, 32)

    sampled = watched(HistogramObserver, x, sample=2**16)
    whole = watched(HistogramObserver, x, sample=None)

    tail = whole.counts.flip(0).cumsum(0).flip(0) <= x.numel() / 4000
    assert torch.equal(sampled.counts[tail], whole.counts[tail])
    assert torch.equal(sampled.amax, whole.amax)
    difference = (sampled.counts.cumsum(0) - whole.counts.cumsum(0)).abs().max()
    assert 0 < difference < 0.005 * x.numel()


def test_what_does_not_fill_a_block_is_counted() -> None:
    x = torch.zeros(2**12 + BLOCK - 1)
    x[-1] = 5

    statistics = watched(HistogramObserver, x, sample=2**10)

    assert statistics.counts[bin_index(torch.tensor(5.0))] == 1
    assert statistics.amax == 5


def test_a_tensor_whose_peaks_are_all_equal_is_sampled() -> None:
    """Half of ReLU6's outputs can be 6: that must not make the tail the whole."""
    x = torch.full((2**16,), 6.0)
    x[::2] = 1.0

    counts = watched(HistogramObserver, x, sample=2**12).counts

    assert counts[bin_index(torch.tensor(6.0))] == counts[bin_index(torch.tensor(1.0))] == 2**15


def test_samples_are_always_the_same() -> None:
    x = activations(64, 16, 32, 32)

    first, second = (watched(HistogramObserver, x, sample=2**14).counts for _ in range(2))

    assert torch.equal(first, second)


@pytest.mark.parametrize(
    "x",
    [
        pytest.param(
            torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), id="cl"
        ),
        pytest.param(torch.randn(4, 6).t(), id="transposed"),
        pytest.param(torch.randn(8, 8)[::2, 1:5], id="strided"),
        pytest.param(torch.randn(1, 5).expand(3, 5), id="expanded"),
        pytest.param(torch.randn(()), id="scalar"),
    ],
)
def test_memory_order_loses_nothing(x: Tensor) -> None:
    flat = in_memory_order(x)

    assert flat.sort().values.tolist() == x.flatten().sort().values.tolist()
    if x.dim() == 4:
        assert flat.data_ptr() == x.data_ptr()


# -------------------------------------------------------------------------------- histograms


def test_moments_are_numpys() -> None:
    """Of values in the middle of bins, cut between bins, the moments are plain sums."""
    edges = bin_edges()[bin_index(torch.tensor(1.0)) :][:40]
    counts = torch.zeros(BINS, dtype=torch.int64)
    start = int(bin_index(torch.tensor(1.0)))
    counts[start : start + 39] = torch.arange(1, 40)
    histogram = Histogram(counts, edges[-1].float() * (1 - 2**-20))

    found = histogram.moments_below(edges[[0, 1, 17]])

    left, right = edges[:-1].numpy(), edges[1:].numpy()
    n = np.arange(1, 40)
    exact = [n, n * (left + right) / 2, n * (right**3 - left**3) / (3 * (right - left))]
    for i, end in enumerate([0, 1, 17]):
        np.testing.assert_allclose(found[:, i], [m[:end].sum() for m in exact], rtol=1e-12)
    inside = histogram.moments_below((edges[4:5] * 3 + edges[5:6]) / 4)[0]
    assert inside.item() == pytest.approx(1 + 2 + 3 + 4 + 5 / 4)


def test_linear_bins_keep_the_counts() -> None:
    values = activations(40000)
    histogram = watched(HistogramObserver, values).histogram

    counts = histogram.linear(64, 2.0)

    expected = np.histogram(values.numpy().clip(max=2.0), bins=64, range=(0, 2))[0]
    assert counts.sum().item() == pytest.approx(40000)
    np.testing.assert_allclose(counts.numpy(), expected, atol=60)
