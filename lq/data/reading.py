"""Read images and labels of any map-style dataset, leaving the global random state as it was."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset
from tqdm.auto import tqdm

BATCH = 64
"""Images that are in memory at a time."""
LabelledImage = tuple[Tensor, int | None]


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Put the global random state of torch, numpy and Python back afterwards."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def split_sample(sample: Any) -> LabelledImage:
    """Return the image of a sample, and its class number where it has one.

    Raises:
        ValueError: If there is no image tensor.

    Example:
        >>> split_sample((torch.zeros(1, 2, 2), torch.tensor(3)))[1]
        3
    """
    parts: list[Any] = [*sample] if isinstance(sample, (tuple, list)) else [sample]
    image = parts[0] if parts else None
    if not isinstance(image, Tensor) or image.dim() == 0:
        raise ValueError(
            f"Expected samples to begin with an image tensor, but got {type(image).__name__}; "
            "give the dataset a transform that ends in a tensor."
        )
    return image, _class_number(parts[1]) if len(parts) > 1 else None


def _class_number(label: Any) -> int | None:
    if isinstance(label, Tensor):
        one = label.numel() == 1 and not label.is_floating_point()
        return int(label) if one else None
    return int(label) if isinstance(label, (int, np.integer)) else None


def read(
    dataset: Dataset[Any],
    indices: Sequence[int],
    num_workers: int = 0,
    description: str | None = None,
) -> Iterator[list[LabelledImage]]:
    """Yield images and class numbers, a batch at a time, under a progress bar if it has a name."""
    loader = DataLoader(
        Subset(dataset, indices),
        batch_size=BATCH,
        num_workers=num_workers,
        collate_fn=_split_all,
    )
    yield from tqdm(loader, description, disable=description is None, leave=False)


def _split_all(samples: list[Any]) -> list[LabelledImage]:
    return [split_sample(sample) for sample in samples]


def labels_of(
    dataset: Dataset[Any], size: int, num_workers: int = 0, progress: bool = True
) -> Tensor:
    """Return the class numbers of all samples, int64 ``[size]``.

    Images are decoded only where the dataset gives no list of labels: neither ``targets`` nor
    ``labels``, as those of torchvision and of lq have, nor a part or a sum of such datasets.

    Raises:
        ValueError: If samples have no class number.
    """
    known = known_labels(dataset, size)
    if known is not None:
        return known
    description = "Reading labels" if progress else None
    batches = read(dataset, range(size), num_workers, description)
    found = [label for batch in batches for _, label in batch]
    numbers = [label for label in found if label is not None]
    if len(numbers) < size:
        raise ValueError(
            f"Expected (image, class number) samples for a stratified choice, but sample "
            f"{found.index(None)} has none; choose the strategy 'random' or 'coverage'."
        )
    return torch.tensor(numbers)


def known_labels(dataset: Any, size: int) -> Tensor | None:
    """Return the class numbers that a dataset knows without reading images, if it does."""
    if isinstance(dataset, Subset):
        inner = known_labels(dataset.dataset, len(dataset.dataset))  # type: ignore[arg-type]
        return None if inner is None else inner[torch.as_tensor(dataset.indices)]
    if isinstance(dataset, ConcatDataset):
        parts = [known_labels(d, len(d)) for d in dataset.datasets]  # type: ignore[arg-type]
        known = [part for part in parts if part is not None]
        return torch.cat(known) if len(known) == len(parts) else None
    if isinstance(dataset, TensorDataset):
        return _as_labels(dataset.tensors[1:2], size)
    return _as_labels([getattr(dataset, name, None) for name in ("targets", "labels")], size)


def _as_labels(found: Sequence[Any], size: int) -> Tensor | None:
    for values in found:
        if isinstance(values, (list, tuple, np.ndarray, Tensor)) and len(values) == size:
            array = np.asarray(values)
            if array.ndim == 1 and np.issubdtype(array.dtype, np.integer):
                return torch.from_numpy(array.astype(np.int64))
    return None
