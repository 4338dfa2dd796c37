"""A histogram of magnitudes with a bin for every float: nothing is ever binned again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

OCTAVES = (-64, 64)
"""Magnitudes from 2^-64 to 2^64 have bins of their own; what lies beyond shares the end bins."""
BINS_PER_OCTAVE = 128
BINS = (OCTAVES[1] - OCTAVES[0]) * BINS_PER_OCTAVE
_SHIFT = 16
"""Bits of a float32 that its bin ignores: those that bfloat16 has not."""
_FIRST = (127 + OCTAVES[0]) * BINS_PER_OCTAVE
"""The leading bits of 2^-64."""


def bin_index(x: Tensor) -> Tensor:
    """Return the bin of each magnitude, int32 of the shape of `x`.

    A bin holds the magnitudes that truncate to the same bfloat16, 128 an octave, so its width is
    at most 0.8 % of them. Zero and all below 2^-64 are in the first.

    Example:
        >>> bin_index(torch.tensor([0.0, 1.0, -1.0, 2.0])) - bin_index(torch.tensor(1.0))
        tensor([-8192,     0,     0,   128], dtype=torch.int32)
    """
    bits = x.float().view(torch.int32) & 0x7FFFFFFF
    return bits.bitwise_right_shift_(_SHIFT).sub_(_FIRST).clamp_(0, BINS - 1)


def bin_edges(device: torch.device | None = None) -> Tensor:
    """Return the edges of all bins, float64 ``[BINS + 1]``: bin i is ``[edges[i], edges[i+1])``."""
    bits = torch.arange(_FIRST, _FIRST + BINS + 1, dtype=torch.int32, device=device) << _SHIFT
    edges = bits.view(torch.float32).double()
    edges[0] = 0
    return edges


def count(x: Tensor) -> Tensor:
    """Return how many magnitudes fall in each bin, int64 ``[BINS]``."""
    return torch.bincount(bin_index(x).flatten(), minlength=BINS)


@dataclass(frozen=True)
class Histogram:
    """How the magnitudes of a tensor are distributed; within a bin, evenly.

    Attributes:
        counts: int64 ``[BINS]``.
        amax: Largest magnitude, float32 ``[]``.
    """

    counts: Tensor
    amax: Tensor

    @cached_property
    def edges(self) -> Tensor:
        """Edges of the bins up to the one that holds the largest magnitude, which ends there."""
        edges = bin_edges(self.counts.device)[: int(bin_index(self.amax)) + 2]
        edges[-1] = torch.maximum(self.amax.double(), edges[-2])
        return edges

    @cached_property
    def _moments(self) -> Tensor:
        """Sums of ``x^0, x^1, x^2`` below each edge, float64 ``[3, edges]``."""
        counts = self.counts[: len(self.edges) - 1].double()
        left, right = self.edges[:-1], self.edges[1:]
        middle, width = (left + right) / 2, right - left
        sums = torch.stack([counts, counts * middle, counts * (middle**2 + width**2 / 12)])
        return torch.cat([torch.zeros_like(sums[:, :1]), sums.cumsum(1)], 1)

    @property
    def totals(self) -> Tensor:
        """Sums of ``x^0, x^1, x^2`` over everything, float64 ``[3]``."""
        return self._moments[:, -1]

    def moments_below(self, points: Tensor) -> Tensor:
        """Return the sums of ``x^0, x^1, x^2`` over all ``|x| < point``, ``[3, *points.shape]``."""
        edges = self.edges
        index = (torch.searchsorted(edges, points, right=True) - 1).clamp(0, len(edges) - 2)
        left, width = edges[index], edges[index + 1] - edges[index]
        # The last bin has no width where it begins at the largest magnitude.
        share = torch.where(width > 0, (points - left) / width, (points > left).double())
        inside = share.clamp(max=1) * self.counts[index]
        points = torch.minimum(points, edges[-1])
        middle, spread = (points + left) / 2, (points - left) ** 2 / 12
        partial = torch.stack([inside, inside * middle, inside * (middle**2 + spread)])
        return self._moments[:, index] + partial

    def quantile_bin(self, share: float) -> int:
        """Return the first bin up to whose end at least this share of the magnitudes lies."""
        cumulative = self.counts.cumsum(0).double()  # exact up to 2^53
        index = torch.searchsorted(cumulative, cumulative[-1] * share)
        return min(int(index), len(self.edges) - 2)

    def linear(self, bins: int, limit: float) -> Tensor:
        """Return the counts in bins of equal width over ``[0, limit]``, float64 ``[bins]``.

        What lies beyond the limit counts in the last bin.
        """
        points = torch.linspace(0, limit, bins + 1, dtype=torch.float64, device=self.counts.device)
        below = self.moments_below(points)[0]
        below[-1] = self.totals[0]
        return below.diff()
