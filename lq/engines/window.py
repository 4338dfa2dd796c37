"""A share over the last samples."""

from __future__ import annotations

from collections import deque


class Window:
    """The share of what counts among all, over the last batches that hold enough samples.

    Args:
        samples: How many samples are enough.

    Example:
        >>> window = Window(samples=4)
        >>> for counted in (0, 0, 3):
        ...     window.add(samples=2, counted=counted, total=10)
        >>> window.share, window.is_full
        (0.15, True)
    """

    def __init__(self, samples: int) -> None:
        self._enough = samples
        self._batches: deque[tuple[int, int, int]] = deque()
        self.samples = self.counted = self.total = 0

    def add(self, samples: int, counted: int, total: int) -> None:
        """Take in a batch, and let those go that are not needed."""
        self._batches.append((samples, counted, total))
        self._change(samples, counted, total)
        while self.samples - self._batches[0][0] >= self._enough:
            self._change(*(-count for count in self._batches.popleft()))

    @property
    def share(self) -> float:
        """The share, 0 of nothing."""
        return self.counted / self.total if self.total else 0.0

    @property
    def is_full(self) -> bool:
        """Whether there were enough samples to judge by."""
        return self.samples >= self._enough

    def _change(self, samples: int, counted: int, total: int) -> None:
        self.samples += samples
        self.counted += counted
        self.total += total
