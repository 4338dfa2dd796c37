"""Outputs of a changed model beside those of the float one: sample by sample, then all together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lq.sensitivity.measures import METRICS, SIGNED, Measures

RESAMPLES, CONFIDENCE, CHUNK = 1000, 0.95, 50
COLUMNS = tuple(METRICS)
"""What is kept of each sample: top-1 and top-5 lost (1, 0, -1), loss gained, KL, noise power."""


def compare(reference: Tensor, changed: Tensor, target: Tensor | None) -> Tensor:
    """Return how outputs differ, sample by sample: ``[N, 5]`` float32, as `COLUMNS` says.

    ``KL = sum p log(p / q)`` with ``p`` and ``q`` the softmax of float and changed outputs;
    ``noise = sum (float - changed)^2``. Where there are several places (segmentation), samples
    are means over them. What overflowed to NaN is infinitely bad.

    Args:
        reference: Outputs of the float model, ``[N, classes, ...]``.
        changed: Outputs of the changed one.
        target: Class numbers ``[N, ...]``, if there are any.

    Example:
        >>> compare(torch.eye(2) * 4, torch.eye(2), torch.tensor([0, 0]))[:, 0]
        tensor([0., 0.])
    """
    before, after = (_places(y) for y in (reference, changed))
    found = torch.full((len(before), len(COLUMNS)), torch.nan, dtype=torch.float64)
    if target is not None:
        place = target.reshape(len(before), -1)
        lost = _outcomes(before, place) - _outcomes(after, place)
        found[:, :3] = lost * torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    p, q = before.log_softmax(1), after.log_softmax(1)
    found[:, 3] = _or_infinite((p.exp() * (p - q)).sum(1).mean(1))
    found[:, 4] = _or_infinite((before - after).square().sum((1, 2)))
    if target is not None:
        found[:, 2] = _or_infinite(found[:, 2])
    return found.float()


def describe(reference: Tensor, target: Tensor | None) -> Tensor:
    """Return what is kept of the float outputs: correct or not, loss, 0, and signal power."""
    before = _places(reference)
    found = torch.zeros(len(before), len(COLUMNS), dtype=torch.float64)
    found[:, :3] = torch.nan
    if target is not None:
        found[:, :3] = _outcomes(before, target.reshape(len(before), -1))
    found[:, 4] = before.square().sum((1, 2))
    return found.float()


def _places(output: Tensor) -> Tensor:
    """Return an output as ``[N, classes, places]`` in double precision."""
    return output.detach().reshape(*output.shape[:2], -1).double().cpu()


def _or_infinite(values: Tensor) -> Tensor:
    return values.nan_to_num(nan=math.inf, posinf=math.inf)


def _outcomes(output: Tensor, target: Tensor) -> Tensor:
    """Return top-1, top-5 and loss of each sample ``[N, 3]``."""
    target = target.cpu()
    order = output.nan_to_num(nan=-math.inf).topk(min(5, output.shape[1]), dim=1).indices
    hits = order == target[:, None]
    finite = output.isfinite().all(1)
    top1, top5 = hits[:, 0] & finite, hits.any(1) & finite
    loss = F.cross_entropy(output, target, reduction="none")
    return torch.stack([top1.double().mean(1), top5.double().mean(1), loss.mean(1)], dim=1)


def measures(values: Mapping[str, np.ndarray], power: np.ndarray) -> dict[str, Measures]:
    """Return the measures of several changed models over the same samples, with intervals.

    Samples are drawn with replacement `RESAMPLES` times, the same for all, from a fixed seed
    (percentile bootstrap, Efron and Tibshirani 1993, "An Introduction to the Bootstrap",
    section 13.3).

    Args:
        values: Name -> ``[N, 5]`` as ``compare`` returns them.
        power: Signal power of the float outputs ``[N]``.
    """
    if not values:
        return {}
    stacked = np.stack([v.astype(np.float64) for v in values.values()], axis=1)
    n, models = stacked.shape[:2]
    flat = stacked.reshape(n, -1)
    draws = [_means(counts, flat, power) for counts in _resamples(n)]
    resampled = np.concatenate(draws).reshape(-1, models, len(COLUMNS))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0, method="nearest")
    means = _means(np.ones((1, n)), flat, power).reshape(models, len(COLUMNS))
    return {name: _measures(means[i], low[i], high[i]) for i, name in enumerate(values)}


def _resamples(n: int) -> Iterator[np.ndarray]:
    """Yield how often each sample is drawn, ``[CHUNK, N]`` at a time."""
    rng = np.random.default_rng(0)
    for _ in range(RESAMPLES // CHUNK):
        drawn = rng.integers(0, n, (CHUNK, n)) + n * np.arange(CHUNK)[:, None]
        yield np.bincount(drawn.ravel(), minlength=CHUNK * n).reshape(CHUNK, n).astype(np.float64)


def _means(counts: np.ndarray, values: np.ndarray, power: np.ndarray) -> np.ndarray:
    """Return the weighted means ``[draws, models * 5]``, the last of each five as SQNR in dB."""
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        sums = counts @ values
        spoilt = np.isinf(values).any(0) & np.isnan(sums)  # inf drawn 0 times is NaN
        sums[:, :] = np.where(spoilt, np.inf, sums)
        means = sums / counts.sum(1, keepdims=True)
        signal = counts @ power
        noise = sums[:, 4::5]
        means[:, 4::5] = np.where(noise == 0, np.inf, 10 * np.log10(signal[:, None] / noise))
    found: np.ndarray = means
    return found


def _measures(means: np.ndarray, low: np.ndarray, high: np.ndarray) -> Measures:
    values = {METRICS[c]: float(means[i]) for i, c in enumerate(COLUMNS)}
    intervals = {
        c: (float(low[i]), float(high[i])) for i, c in enumerate(COLUMNS) if not math.isnan(low[i])
    }
    return Measures(**values, intervals=intervals)


def is_noise(found: Measures, metric: str) -> bool:
    """Return whether a measure does not differ from that of the float model.

    Accuracy and loss do not where their interval has 0 in it; KL and SQNR only where the outputs
    are the same.
    """
    low, high = found.intervals.get(metric, (math.nan, math.nan))
    if metric in SIGNED:
        return low <= 0 <= high
    return found.value("kl") == 0 or found.value("sqnr") == math.inf
