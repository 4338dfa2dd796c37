"""Count and cut the samples of batches, whatever a batch looks like."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from lq.batches import tensors


class FirstSamples(Iterable[Any]):
    """The first samples of batches, which can be read again and again.

    Example:
        >>> import torch
        >>> [len(batch) for batch in FirstSamples([torch.zeros(4, 2)] * 3, 6)]
        [4, 2]
    """

    def __init__(self, batches: Iterable[Any], samples: int) -> None:
        self.batches, self.samples = batches, samples

    def __iter__(self) -> Iterator[Any]:
        left = self.samples
        for batch in self.batches:
            yield first_samples(batch, left)
            left -= count_samples(batch)
            if left <= 0:
                return


def count_samples(batch: Any) -> int:
    """Return how many samples a batch holds: the length of its first tensor that has one.

    Raises:
        ValueError: If it holds none.
    """
    lengths = [len(tensor) for tensor in tensors(batch) if tensor.dim()]
    if not lengths:
        raise ValueError(
            f"Expected a batch to hold a tensor of samples, but got {type(batch).__name__}."
        )
    return lengths[0]


def first_samples(batch: Any, samples: int) -> Any:
    """Return a copy of the first samples of a batch, whatever it looks like.

    Tensors of another length than the first hold no samples and stay whole.

    Example:
        >>> import torch
        >>> first_samples({"x": torch.arange(4), "weights": torch.ones(3)}, 2)
        {'x': tensor([0, 1]), 'weights': tensor([1., 1., 1.])}
    """
    return _cut(batch, count_samples(batch), samples)


def _cut(part: Any, length: int, samples: int) -> Any:
    if isinstance(part, Tensor):
        return part[:samples].clone() if part.dim() and len(part) == length else part
    if isinstance(part, Mapping):
        return {name: _cut(value, length, samples) for name, value in part.items()}
    if isinstance(part, (list, tuple)):
        parts = [_cut(value, length, samples) for value in part]
        return tuple(parts) if isinstance(part, tuple) else parts
    return part
