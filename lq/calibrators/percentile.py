"""A percentile of the magnitudes as the range."""

from __future__ import annotations

from torch import Tensor

from lq.histogram import BINS
from lq.observers import HistogramObserver
from lq.spec import QuantSpec

DEFAULT_PERCENTILE = 99.99


def percentile_amax(
    statistics: HistogramObserver, spec: QuantSpec, percentile: float = DEFAULT_PERCENTILE
) -> Tensor:
    """Return the lower edge of the bin in which a percentile of the magnitudes is reached.

    ``amax = edge[min{i : share of |x| in bins 0 ... i is at least percentile / 100}]``

    As pytorch-quantization computes it from the same histogram (NVIDIA, "Integer Quantization for
    Deep Learning Inference", Wu et al. 2020, section 3.2), but for three cases: the 100th
    percentile is the largest magnitude, where the reference stops at the lower edge of its bin;
    so is one that falls in the first or the last bin of all, which are many octaves wide; and
    counts are summed as integers, where the reference sums rounded shares.

    Args:
        statistics: Histogram of the magnitudes.
        spec: Not needed.
        percentile: Above 0 and at most 100.
    """
    histogram = statistics.histogram
    index = histogram.quantile_bin(percentile / 100)
    if index in (0, BINS - 1) or percentile == 100:
        return histogram.amax
    return histogram.edges[index].to(histogram.amax)
