"""Statistics of the tensors that pass a quantizer. Observers collect, calibrators decide."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from lq.functional import in_memory_order
from lq.histogram import BINS, Histogram, bin_index, count
from lq.ranks import world_size

BLOCK = 64
"""Neighbours in memory that are sampled together."""
SAMPLE = 2**18
"""Elements of a tensor that are counted one by one; of larger ones, blocks at equal distances."""
TAIL = 0.02
"""Share of the blocks, those of the largest peaks, that are searched for the tail."""


class RangeObserver:
    """Keeps the largest magnitude of all tensors shown to it.

    Attributes:
        ends: How far everything observed reaches below and above 0, ``[-min x, max x]``, float32
            ``[2]``; ``None`` before the first.
        name: Whose input is observed, for messages.
        batch: Number of the batch being observed, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.batch = 0
        self.ends: Tensor | None = None
        self._last: tuple[weakref.ref[Tensor], int] | None = None

    @property
    def amax(self) -> Tensor | None:
        """``max |x|`` over everything observed, ``[]``; ``None`` before the first."""
        return None if self.ends is None else self.ends.amax().abs()  # not -0

    def observe(self, x: Tensor) -> None:
        """Take note of one tensor, once where several layers in a row are given the same.

        Raises:
            RuntimeError: If it holds NaN or infinity.
        """
        if x.numel() > 0 and not self._is_last(x):
            self._collect(x.detach())

    def _is_last(self, x: Tensor) -> bool:
        if x.is_inference():  # it may have been changed in place, and does not tell
            return False
        last, self._last = self._last, (weakref.ref(x), x._version)
        return last is not None and last[0]() is x and last[1] == x._version

    def _collect(self, x: Tensor) -> None:
        low, high = torch.aminmax(x)
        self._note(low, high)

    def _note(self, low: Tensor, high: Tensor) -> None:
        ends = torch.stack([-low, high]).float()
        if not ends.isfinite().all():
            raise RuntimeError(
                f"Expected finite activations, but {self.name!r} got NaN or infinity in batch "
                f"{self.batch}."
            )
        self.ends = ends if self.ends is None else torch.maximum(self.ends, ends)

    def synchronize(self, device: torch.device) -> None:
        """Merge the statistics of all ranks into each, where training is distributed."""
        if world_size() == 1:
            return
        # A rank that saw nothing must take part all the same.
        nothing = torch.full((2,), -torch.inf, device=device)
        ends = nothing if self.ends is None else self.ends
        torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX)
        self.ends = ends if ends.isfinite().all() else None


class HistogramObserver(RangeObserver):
    """Keeps a histogram of magnitudes besides the largest, in constant memory.

    Of a tensor of more than `sample` elements the tail is counted in full, and of the rest one
    block in so many, its counts multiplied by as many. Counts are sums, so those of two halves
    of the data, or of two ranks, add up to exactly those of the whole.

    Args:
        name: Whose input is observed, for messages.
        sample: Elements of a tensor that are counted; ``None`` counts all.

    Attributes:
        counts: int64 ``[BINS]`` (see ``lq.histogram``); ``None`` before the first tensor.
    """

    def __init__(self, name: str, sample: int | None = SAMPLE) -> None:
        super().__init__(name)
        self.sample = sample
        self.counts: Tensor | None = None

    @property
    def histogram(self) -> Histogram:
        """What was observed."""
        assert self.counts is not None
        assert self.amax is not None
        return Histogram(self.counts, self.amax)

    def _collect(self, x: Tensor) -> None:
        values = in_memory_order(x)
        if self.sample is None or values.numel() <= self.sample:
            super()._collect(values)
            counts = count(values)
        else:
            whole = values.numel() // BLOCK * BLOCK
            blocks, rest = values[:whole].view(-1, BLOCK), values[whole:]
            lows, highs = blocks.amin(1), blocks.amax(1)
            self._note(lows.amin(), highs.amax())
            peaks = torch.maximum(highs, -lows)
            counts = _count_sampled(blocks, peaks, -(-values.numel() // self.sample))
            if rest.numel():
                super()._collect(rest)
                counts += count(rest)
        self.counts = counts if self.counts is None else self.counts.add_(counts)

    def synchronize(self, device: torch.device) -> None:
        """Merge the statistics of all ranks into each."""
        super().synchronize(device)
        if world_size() == 1 or self.amax is None:
            return
        if self.counts is None:
            self.counts = torch.zeros(BINS, dtype=torch.int64, device=device)
        torch.distributed.all_reduce(self.counts)


def _count_sampled(blocks: Tensor, peaks: Tensor, every: int) -> Tensor:
    """Count one block in `every`, but everything in the bins of the highest peaks."""
    peak_bins = bin_index(peaks)
    reached = torch.bincount(peak_bins, minlength=BINS).cumsum(0)
    cut = int(torch.searchsorted(reached, int((1 - TAIL) * len(peaks)))) + 1
    counts = count(blocks[::every]) * every
    counts[cut:] = count(blocks[peak_bins >= cut])[cut:]
    return counts
