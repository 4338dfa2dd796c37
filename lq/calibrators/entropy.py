"""The range that loses the least information."""

from __future__ import annotations

import torch
from torch import Tensor

from lq.observers import HistogramObserver
from lq.spec import QuantSpec

BINS = 2048
"""Bins of equal width that the magnitudes are counted in."""
START = 128
"""The smallest range tried, in bins."""
OUTLIERS = 8.0
"""Bins reach to the largest magnitude, but not beyond so many times the 99.99th percentile."""


def entropy_amax(statistics: HistogramObserver, spec: QuantSpec) -> Tensor:
    """Return the range whose quantized distribution diverges least from the original.

    ``amax = argmin_a KL(P_a || Q_a)``: ``P_a`` the magnitudes clipped to `a`, ``Q_a`` the same
    after merging bins into as many levels as the format has.

    As TensorRT (Migacz, "8-bit Inference with TensorRT", 2017) and pytorch-quantization define it,
    on 2048 bins, and the same range as the latter on the same bins. Differs in where the bins
    end: a few values far out (beyond 8 times the 99.99th percentile) are counted in the last bin,
    for over a range of 1e30 all else would fall in the first. Formats that are not integers have
    no levels of equal width; for them the range is the largest magnitude.

    Args:
        statistics: Histogram of the magnitudes.
        spec: Gives the number of levels.
    """
    histogram = statistics.histogram
    usual = float(histogram.edges[histogram.quantile_bin(0.9999) + 1]) * OUTLIERS
    limit = min(float(histogram.amax), usual)
    if not spec.number_format.is_integer or limit == 0:
        return histogram.amax
    levels = 1 << (spec.number_format.bits - int(spec.signed))
    best = entropy_bin(histogram.linear(BINS, limit), levels)
    return torch.as_tensor(limit * best / BINS).to(histogram.amax)


def entropy_bin(counts: Tensor, levels: int, start: int = START) -> int:
    """Return after how many bins the range of least divergence ends.

    For every end ``i``, with ``p`` the counts below it and all beyond added to the last, and ``q``
    the mean of the filled bins of each level:
    ``KL_i = sum_j p_j / P log((p_j / P) / (q_j / Q))``.

    Args:
        counts: Counts in bins of equal width, ``[B]``.
        levels: Levels of the format, 128 for int8.
        start: Smallest range tried, in bins.

    Returns:
        A number from `start` to ``B``; of equal ones the largest.
    """
    counts = counts.double().clone()
    counts[0] = counts[1]  # zeros are exact at any range
    size = len(counts)
    if size < start or counts.sum() == 0:
        return size
    ends = torch.arange(start, size + 1, device=counts.device)
    # Level g of end i begins at bin ceil(g i / levels).
    steps = torch.arange(levels + 1, device=counts.device)
    bounds = (steps * ends[:, None] + levels - 1) // levels  # [ends, levels + 1]
    below, filled = _before(counts), _before((counts > 0).double())
    sums, widths = below[bounds].diff(dim=1), filled[bounds].diff(dim=1)
    means = torch.where(widths > 0, sums / widths.clamp_min(1), 0)
    own, beyond, last = below[ends], below[-1] - below[ends], counts[ends - 1]
    plogp = _before(torch.xlogy(counts, counts))[ends] - torch.xlogy(last, last)
    plogp = plogp + torch.xlogy(last + beyond, last + beyond)
    # The clipped values are in the last bin, which is empty in Q where it was in P.
    level_of_last = (ends - 1) * levels // ends
    mean_of_last = torch.where(last > 0, means.gather(1, level_of_last[:, None])[:, 0], 0)
    plogq = torch.xlogy(sums, means).sum(1) + torch.xlogy(beyond, mean_of_last)
    divergence = (plogp - plogq) / below[-1] + torch.log(own / below[-1])
    divergence = divergence.nan_to_num(torch.inf, torch.inf)
    return int(ends[len(ends) - 1 - divergence.flip(0).argmin()])


def _before(values: Tensor) -> Tensor:
    """Return the sums of all values before each position, ``[N + 1]``."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
