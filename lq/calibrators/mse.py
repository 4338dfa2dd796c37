"""The range with the smallest squared error."""

from __future__ import annotations

import torch
from torch import Tensor

from lq.functional import FP8_MAX
from lq.histogram import Histogram
from lq.observers import HistogramObserver
from lq.spec import QuantSpec


def mse_amax(statistics: HistogramObserver, spec: QuantSpec) -> Tensor:
    """Return the range that minimises the squared quantization error of a histogram.

    ``amax = argmin_a integral (x - Q(x; a))^2 dH(x)``, over the edges of all bins from half the
    median magnitude up.

    The integral is exact for a density that is even within each bin, clipping included. Differs
    from pytorch-quantization, which takes each bin's middle for all of it, tries only bins from
    the 128th on, and returns the middle of a bin. The code -128, which only a negative value
    beyond the range can have, is left out.

    Args:
        statistics: Histogram of the magnitudes.
        spec: Gives the numbers that magnitudes are rounded to.
    """
    histogram = statistics.histogram
    candidates = _candidates(histogram)
    errors = squared_errors(histogram, candidates, unit_levels(spec).to(candidates.device))
    return candidates[errors.argmin()].to(histogram.amax)


def _candidates(histogram: Histogram) -> Tensor:
    """Return the upper edges ``[K]`` of filled bins from half the median magnitude up."""
    filled = histogram.counts[: len(histogram.edges) - 1] > 0
    filled[0] = False  # zeros have no say in where half of the magnitudes lie
    edges, counts = histogram.edges[1:][filled], histogram.counts[: len(filled)][filled]
    if len(edges) == 0:
        return histogram.amax.double().view(1)
    cumulative = counts.cumsum(0)
    median = edges[torch.searchsorted(cumulative, (int(cumulative[-1]) + 1) // 2)]
    return edges[edges >= median / 2]


def unit_levels(spec: QuantSpec) -> Tensor:
    """Return the magnitudes a format has, float64 ``[L]``, ascending from 0 to 1.

    Example:
        >>> unit_levels(QuantSpec("int3"))
        tensor([0.0000, 0.3333, 0.6667, 1.0000], dtype=torch.float64)
    """
    if spec.qmax == FP8_MAX:
        codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    else:
        codes = torch.arange(int(spec.qmax) + 1)
    return codes.double() / spec.qmax


def squared_errors(histogram: Histogram, amax: Tensor, levels: Tensor) -> Tensor:
    """Return the sum of squared errors for each range, float64 ``[K]``.

    Magnitudes are rounded to the nearest of ``amax * levels``; so with the sums ``S0, S1, S2`` of
    ``x^0, x^1, x^2`` over those that go to level ``q``, its error is ``S2 - 2 q S1 + q^2 S0``.

    Args:
        histogram: Magnitudes.
        amax: Ranges ``[K]``, float64.
        levels: Magnitudes of the format, float64 ``[L]``, from 0 to 1.
    """
    middles = (levels[1:] + levels[:-1]) / 2
    below = histogram.moments_below(amax[:, None] * middles)  # [3, K, L - 1]
    ends = histogram.totals[:, None, None].expand(-1, len(amax), -1)
    s0, s1, s2 = torch.cat([below, ends], 2).diff(dim=2, prepend=torch.zeros_like(ends))
    q = amax[:, None] * levels
    errors: Tensor = (s2 - 2 * q * s1 + q**2 * s0).sum(1)
    return errors
