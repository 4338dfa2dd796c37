"""What calibration images must not be: augmented, or images of validation and test."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lq.data.reading import read, split_sample

PROBES = 32
"""Images that are read twice; a flip of every other image escapes once in 2^32."""


def image_digest(image: Tensor) -> bytes:
    """Return a hash of an image's type, shape and values."""
    values = image.detach().cpu().contiguous().flatten().view(torch.uint8)
    head = f"{image.dtype}{list(image.shape)}".encode()
    return hashlib.blake2b(head + values.numpy().tobytes(), digest_size=16).digest()


def refuse_augmentation(
    dataset: Dataset[Any], indices: Sequence[int], where: str = "the dataset"
) -> None:
    """Raise a ``ValueError`` if an image is another one when it is read again."""
    for index in islice(cycle(indices), PROBES):
        first, again = (image_digest(split_sample(dataset[index])[0]) for _ in range(2))
        if first != again:
            raise ValueError(
                f"Expected images that are not augmented, but image {index} of {where} changes "
                "each time it is read; pass a dataset that has the transform of validation (of "
                "lq's own, the one that `augmented()` was called on)."
            )


def refuse_overlap(
    dataset: Dataset[Any],
    indices: Sequence[int],
    exclude: Sequence[Dataset[Any]],
    num_workers: int = 0,
    progress: bool = True,
) -> None:
    """Raise a ``ValueError`` if any of the chosen images is in a dataset that is evaluated on.

    Images are compared as the model sees them, by a hash of the tensor, so both datasets must
    have the same transform. Memory holds the hashes of the chosen images alone.
    """
    if not exclude:
        return
    chosen = [image_digest(x) for batch in read(dataset, indices, num_workers) for x, _ in batch]
    wanted = set(chosen)
    description = "Looking for overlap" if progress else None
    for position, other in enumerate(exclude):
        where, every = f"exclude[{position}]", range(len(other))  # type: ignore[arg-type]
        refuse_augmentation(other, every[:PROBES], where)
        batches = read(other, every, num_workers, description)
        digests = (image_digest(x) for batch in batches for x, _ in batch)
        shared = {digest for digest in digests if digest in wanted}
        if shared:
            raise ValueError(_overlap(indices, chosen, shared, where))


def _overlap(indices: Sequence[int], chosen: list[bytes], shared: set[bytes], where: str) -> str:
    found = [index for index, digest in zip(indices, chosen, strict=True) if digest in shared]
    shown = ", ".join(map(str, found[:5])) + ", ..." * (len(found) > 5)
    return (
        f"Expected calibration images that are neither validated nor tested on, but "
        f"{len(found)} of {len(chosen)} are in {where} too: images {shown}; leave them out with "
        "torch.utils.data.Subset, or pass the training images."
    )
