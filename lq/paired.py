"""The accuracy that a model loses against another, measured on the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_Z = 1.959964
"""The normal distribution has 95% within so many standard deviations."""


@dataclass(frozen=True)
class Drop:
    """How much less often a model is right than the float one, on the same samples.

    Attributes:
        mean: Share of samples that it loses, less those that it wins.
        low: Lower end of the 95% interval.
        high: Upper end.
        top1: Share of samples it is right on.
        n: Samples.
    """

    mean: float
    low: float
    high: float
    top1: float
    n: int

    def __str__(self) -> str:
        return f"drop {self.mean:+.2%} (95%: {self.low:+.2%} .. {self.high:+.2%}, {self.n} samples)"


def paired_drop(before: Tensor, after: Tensor, places: Tensor | None = None) -> Drop:
    """Return the drop between two models that were right or wrong on the same samples.

    With ``b`` samples lost and ``c`` won of ``n``, half a sample added to each of the four kinds:
    ``d = (b - c) / (n + 2)``, ``d +- 1.96 sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2)``.
    Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions".
    No sample lost is thus no proof that none would be.

    Of a dense output the places of one sample are not independent, so the samples count: with
    ``x_i`` places lost less won of the ``p_i`` of a sample, ``p`` their mean, and half a sample of
    ``p`` places added to each kind, ``d = sum(x_i) / P`` with ``P = sum(p_i) + 2 p``, and
    ``d +- 1.96 sqrt(sum((x_i - d p_i)^2) + p^2 (1 + 2 d^2)) / P``: a ratio of sums over clusters
    (Cochran 1977, "Sampling Techniques", section 9A.4), which is the above for one place each.

    Args:
        before: Whether the float model is right, ``[N]``; of a dense output ``[sum(p_i)]``.
        after: Whether the other is.
        places: Of a dense output, the places of each sample, ``[N]``.

    Example:
        >>> import torch
        >>> right = torch.ones(500, dtype=torch.bool)
        >>> drop = paired_drop(right, right)
        >>> drop.mean, round(drop.high, 4)
        (0.0, 0.0039)
    """
    lost = before.double() - after.double()
    if places is None:
        places = torch.ones(len(before), dtype=torch.long)
    sample = torch.repeat_interleave(torch.arange(len(places)), places)
    x, p = torch.zeros(len(places)).double().index_add_(0, sample, lost), places.double()
    mean = float(p.mean())
    padded = float(p.sum()) + 2 * mean
    centre = float(x.sum()) / padded
    spread = float((x - centre * p).square().sum()) + mean**2 * (1 + 2 * centre**2)
    margin = _Z * math.sqrt(spread) / padded
    return Drop(
        float(lost.mean()), centre - margin, centre + margin, float(after.double().mean()), len(p)
    )
