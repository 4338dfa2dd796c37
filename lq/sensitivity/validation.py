"""Validation data as a sweep wants them."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, Subset


def shuffled(loader: Any, batches: int | None) -> DataLoader[Any]:
    """Return a loader of all ranks' data in a fixed random order, of so many batches.

    Args:
        loader: A loader of validation data, or a list of one.
        batches: How many batches; all, if not given.

    Raises:
        ValueError: If the data are not one set whose samples can be taken in any order.

    Example:
        >>> data = torch.arange(6.0)[:, None]
        >>> [len(batch) for batch in shuffled(DataLoader(data, batch_size=2), batches=2)]
        [2, 2]
    """
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        (loader,) = loader
    dataset = loader.dataset if isinstance(loader, DataLoader) else None
    if dataset is None or isinstance(dataset, IterableDataset) or not loader.batch_size:
        raise ValueError(
            "Expected one DataLoader of validation data with a `batch_size` and samples by number, "
            f"but got {type(loader).__name__}; call lq.sweep with batches of your own."
        )
    if batches is not None and batches < 1:
        raise ValueError(f"Expected `batches` to be at least 1, but got {batches}.")
    size = len(dataset)  # type: ignore[arg-type]
    order = torch.randperm(size, generator=torch.Generator().manual_seed(0)).tolist()
    count = len(order) if batches is None else batches * loader.batch_size
    return DataLoader(
        Subset(dataset, order[:count]),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
    )
