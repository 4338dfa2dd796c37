"""The accuracy that a model loses against another, measured on the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

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


def paired_drop(before: Tensor, after: Tensor) -> Drop:
    """Return the drop between two models that were right or wrong on the same samples.

    With ``b`` samples lost and ``c`` won of ``n``, half a sample added to each of the four kinds:
    ``d = (b - c) / (n + 2)``, ``d +- 1.96 sqrt(b + c + 1 - (b - c)^2 / (n + 2)) / (n + 2)``.
    Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions".
    No sample lost is thus no proof that none would be.

    Args:
        before: Whether the float model is right, ``[N]``.
        after: Whether the other is.

    Example:
        >>> import torch
        >>> right = torch.ones(500, dtype=torch.bool)
        >>> drop = paired_drop(right, right)
        >>> drop.mean, round(drop.high, 4)
        (0.0, 0.0039)
    """
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    n, padded = len(before), len(before) + 2
    centre = (lost - won) / padded
    margin = _Z * math.sqrt(lost + won + 1 - (lost - won) ** 2 / padded) / padded
    mean, top1 = (lost - won) / n, int(after.sum()) / n
    return Drop(mean, centre - margin, centre + margin, top1, n)
