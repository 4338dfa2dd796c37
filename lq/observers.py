"""Statistics of the tensors that pass a quantizer. Observers collect, calibrators decide."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 4096
"""Bins of a histogram of magnitudes."""
_EXACT = 2**24
"""histc counts in float32, which is exact up to here."""


class RangeObserver:
    """Keeps the largest magnitude of all tensors shown to it.

    Attributes:
        amax: ``max |x|`` over everything observed, float32 ``[]``; ``None`` before the first.
        name: Whose input is observed, for messages.
        batch: Number of the batch being observed, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.batch = 0
        self.amax: Tensor | None = None

    def observe(self, x: Tensor) -> None:
        """Take note of one tensor.

        Raises:
            RuntimeError: If it holds NaN or infinity.
        """
        if x.numel() == 0:
            return
        x = x.detach()
        low, high = torch.aminmax(x)
        amax = torch.maximum(-low, high).float()
        if not amax.isfinite():
            raise RuntimeError(
                f"Expected finite activations, but {self.name!r} got NaN or infinity in batch "
                f"{self.batch}."
            )
        self.amax = amax if self.amax is None else torch.maximum(self.amax, amax)

    def synchronize(self, device: torch.device) -> None:
        """Merge the statistics of all ranks into each, where training is distributed."""
        if _world_size() == 1:
            return
        # A rank that saw nothing must take part all the same.
        amax = torch.full((), -1.0, device=device) if self.amax is None else self.amax
        torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX)
        self.amax = None if amax < 0 else amax


class HistogramObserver(RangeObserver):
    """Keeps a histogram of magnitudes besides the largest, in constant memory.

    ``counts[i]`` is how many ``|x|`` fell in ``[i, i + 1) * limit / BINS``. The limit is a power
    of two and doubles when a larger magnitude comes, merging bins; so histograms of two halves of
    the data add up to exactly that of the whole.

    Attributes:
        counts: int64 ``[BINS]``.
        limit: Upper edge of the last bin.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.counts: Tensor | None = None
        self.limit = 0.0

    def observe(self, x: Tensor) -> None:
        """Take note of one tensor."""
        super().observe(x)
        if self.amax is None or x.numel() == 0:
            return
        self._grow(_power_of_two_above(self.amax.item()), x.device)
        assert self.counts is not None
        shares = (x.detach().float().abs().flatten() * (1 / self.limit)).clamp_max_(1.0)
        for part in torch.split(shares, _EXACT):
            self.counts += torch.histc(part, BINS, 0, 1).long()

    def _grow(self, limit: float, device: torch.device) -> None:
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
            self.limit = limit
        if limit > self.limit:
            self.counts = merge_bins(self.counts, limit / self.limit)
            self.limit = limit

    def synchronize(self, device: torch.device) -> None:
        """Merge the statistics of all ranks into each."""
        super().synchronize(device)
        if _world_size() == 1 or self.amax is None:
            return
        self._grow(_power_of_two_above(self.amax.item()), device)
        assert self.counts is not None
        torch.distributed.all_reduce(self.counts)


def merge_bins(counts: Tensor, factor: float) -> Tensor:
    """Return a histogram of the same length over a range `factor` (a power of two) times as wide.

    Example:
        >>> merge_bins(torch.tensor([1, 2, 3, 4]), 2.0)
        tensor([3, 7, 0, 0])
    """
    bins = counts.numel()
    merged = torch.zeros_like(counts)
    if factor >= bins:
        merged[0] = counts.sum()
    else:
        width = int(factor)
        merged[: bins // width] = counts.view(-1, width).sum(1)
    return merged


def _power_of_two_above(value: float) -> float:
    """Return the smallest power of two above `value`, at least 2^-100."""
    exponent = math.frexp(value)[1] if value else -100
    return 2.0 ** max(exponent, -100)


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_initialized() else 1
