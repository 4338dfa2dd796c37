"""What a choice of calibration images looks like."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lq.data.reading import LabelledImage


@dataclass(frozen=True)
class CalibrationReport:
    """Class counts and channel statistics of calibration images, as the model sees them.

    Attributes:
        size: Images chosen.
        of: Images to choose from.
        strategy: How they were chosen.
        seed: What fixed the choice.
        class_counts: Class number -> images; empty without labels.
        mean: Mean of each channel.
        std: Standard deviation of each channel, over all pixels.
        low: Smallest value of each channel.
        high: Largest value of each channel.
    """

    size: int
    of: int
    strategy: str
    seed: int
    class_counts: Mapping[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]

    def __str__(self) -> str:
        lines = [f"{self.size} of {self.of} images, {self.strategy}, seed {self.seed}"]
        if counts := list(self.class_counts.values()):
            few, many = min(counts), max(counts)
            each = str(few) if few == many else f"{few} to {many}"
            lines.append(f"{len(counts)} classes, {each} images each")
        lines.append("channel    mean     std      min      max")
        columns = zip(self.mean, self.std, self.low, self.high, strict=True)
        lines += [
            f"{channel:7d}{mean:8.3f}{std:8.3f}{low:9.3f}{high:9.3f}"
            for channel, (mean, std, low, high) in enumerate(columns)
        ]
        return "\n".join(lines)


class ChannelStatistics:
    """Adds up the moments and the extremes of each channel, image by image.

    Example:
        >>> statistics = ChannelStatistics()
        >>> statistics.add(torch.tensor([[1.0, 3.0]]))
        >>> statistics.mean, statistics.std
        (tensor([2.], dtype=torch.float64), tensor([1.], dtype=torch.float64))
    """

    def __init__(self) -> None:
        self.count = 0
        self.sum = self.squares = torch.zeros((), dtype=torch.float64)
        self.low, self.high = torch.tensor(torch.inf), torch.tensor(-torch.inf)

    def add(self, image: Tensor) -> None:
        """Take in one image ``[C, ...]``."""
        pixels = image.reshape(len(image), -1).double()
        self.count += pixels.shape[1]
        self.sum = self.sum + pixels.sum(1)
        self.squares = self.squares + pixels.square().sum(1)
        self.low = torch.minimum(self.low, pixels.amin(1))
        self.high = torch.maximum(self.high, pixels.amax(1))

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, float64 ``[C]``."""
        return self.sum / self.count

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel, float64 ``[C]``."""
        return (self.squares / self.count - self.mean.square()).clamp_min(0).sqrt()


def summarize(
    batches: Iterable[list[LabelledImage]], of: int, strategy: str, seed: int
) -> CalibrationReport:
    """Return the report of images that are read once, a batch at a time."""
    counts: Counter[int] = Counter()
    channels = ChannelStatistics()
    size = 0
    for image, label in (pair for batch in batches for pair in batch):
        channels.add(image)
        size += 1
        if label is not None:
            counts[label] += 1
    found = (channels.mean, channels.std, channels.low, channels.high)
    mean, std, low, high = (tuple(values.tolist()) for values in found)
    return CalibrationReport(
        size, of, strategy, seed, dict(sorted(counts.items())), mean, std, low, high
    )
