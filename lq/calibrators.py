"""From statistics to ranges: pure functions, and the names they go by."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from lq.messages import suggest
from lq.observers import HistogramObserver, RangeObserver


def max_amax(statistics: RangeObserver) -> Tensor:
    """Return the largest magnitude seen: nothing is clipped.

    ``amax = max |x|``
    """
    assert statistics.amax is not None
    return statistics.amax


def percentile_amax(statistics: HistogramObserver, percentile: float) -> Tensor:
    """Return the upper edge of the bin that holds a percentile of the magnitudes.

    ``amax = min{edge : share of |x| <= edge is at least percentile / 100}``

    It lies within one bin above the exact percentile, and never above the largest magnitude
    (NVIDIA, "Integer Quantization for Deep Learning Inference", Wu et al. 2020, section 3.2).

    Args:
        statistics: Histogram of the magnitudes.
        percentile: Above 0 and at most 100.
    """
    counts, amax = statistics.counts, statistics.amax
    assert counts is not None
    assert amax is not None
    cumulative = counts.cumsum(0).double()  # exact up to 2^53
    wanted = cumulative[-1] * (percentile / 100)
    edge = (torch.searchsorted(cumulative, wanted) + 1) * (statistics.limit / counts.numel())
    return torch.minimum(edge.to(amax), amax)


def weight_amax(weight: Tensor, axis: int | None) -> Tensor:
    """Return the largest magnitude of a weight, per channel (``[C]``) or per tensor (``[]``).

    Example:
        >>> weight_amax(torch.tensor([[1.0, -3.0], [0.5, 0.25]]), axis=0)
        tensor([3.0000, 0.5000])
    """
    magnitudes = weight.detach().abs().float()
    if axis is None:
        return magnitudes.amax()
    return magnitudes.amax([i for i in range(weight.dim()) if i != axis])


@dataclass(frozen=True)
class Calibrator:
    """A way to choose a range: what to observe, and what to make of it."""

    observer: type[RangeObserver]
    amax: Callable[..., Tensor]


CALIBRATORS = ("max", "percentile", "percentile(p)")
DEFAULT_PERCENTILE = 99.99


def parse_calibrator(name: str) -> Calibrator:
    """Return a calibrator by name: ``"max"``, ``"percentile"`` or ``"percentile(99.9)"``.

    Raises:
        ValueError: For an unknown name or a percentile outside (0, 100].

    Example:
        >>> parse_calibrator("percentil")
        Traceback (most recent call last):
        ValueError: Expected `calibrator` to be one of max, percentile, percentile(p), but got
        'percentil'; did you mean 'percentile'?
    """
    if name == "max":
        return Calibrator(RangeObserver, max_amax)
    match = re.fullmatch(r"percentile(?:\((\d+\.?\d*)\))?", str(name))
    if match:
        percentile = float(match[1]) if match[1] else DEFAULT_PERCENTILE
        if not 0 < percentile <= 100:
            raise ValueError(f"Expected a percentile in (0, 100], but got {name!r}.")
        return Calibrator(HistogramObserver, partial(percentile_amax, percentile=percentile))
    raise ValueError(
        f"Expected `calibrator` to be one of {', '.join(CALIBRATORS)}, but got {name!r}; "
        f"{suggest(name, CALIBRATORS)}"
    )
