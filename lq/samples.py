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
            yield _first(batch, left)
            left -= count_samples(batch)
            if left <= 0:
                return


def count_samples(batch: Any) -> int:
    """Return how many samples a batch holds: the length of its first tensor.

    Raises:
        ValueError: If it holds none.
    """
    found = tensors(batch)
    if not found or found[0].dim() == 0:
        raise ValueError(
            f"Expected a batch to hold a tensor of samples, but got {type(batch).__name__}."
        )
    return len(found[0])


def _first(batch: Any, samples: int) -> Any:
    if isinstance(batch, Tensor):
        return batch[:samples] if batch.dim() else batch
    if isinstance(batch, Mapping):
        return {name: _first(value, samples) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        parts = [_first(value, samples) for value in batch]
        return tuple(parts) if isinstance(batch, tuple) else parts
    return batch
