"""Data that need no download: handwritten digits, and images made from a seed."""

from __future__ import annotations

import logging
from typing import Any

import torch

from lq.data.base import ImageDataModule, at_least
from lq.datasets import TensorImages, read_digits, synthetic_images

log = logging.getLogger(__name__)


class DigitsDataModule(ImageDataModule):
    """Handwritten digits, 8x8, from scikit-learn: nothing to download.

    Of 1797 images 1197 train, 200 validate and 400 test; each class has its share of each.

    Example:
        >>> images, labels = next(iter(DigitsDataModule(batch_size=4).calibration_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4]))
    """

    name = "digits"
    num_classes = 10
    input_shape = (1, 8, 8)

    def read(self, split: str) -> TensorImages:
        """Return a stratified part of the digits."""
        from sklearn.model_selection import train_test_split

        data = read_digits()
        rest, test = train_test_split(
            torch.arange(len(data.labels)),
            test_size=400,
            stratify=data.labels,
            random_state=self.seed,
        )
        train, val = train_test_split(
            rest, test_size=200, stratify=data.labels[rest], random_state=self.seed
        )
        part = {"train": train, "val": val, "test": test}[split]
        return TensorImages(data.at(part), mean=[0.3053], std=[0.3760], peak=16)


class SyntheticDataModule(ImageDataModule):
    """Made-up images, for trying things out: a random pattern for each class, under noise.

    Accuracy on them says nothing about a model; the name ``synthetic`` in every report says so.

    Args:
        num_classes: Number of classes.
        input_shape: Channels, height and width.
        train_size: Number of training images.
        val_size: Number of validation images.
        test_size: Number of test images.
        kwargs: Arguments of ``ImageDataModule``.
    """

    name = "synthetic"
    num_classes = 10

    def __init__(
        self,
        num_classes: int = 10,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        train_size: int = 1024,
        val_size: int = 256,
        test_size: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        at_least("num_classes", num_classes, 1)
        self.num_classes, self.input_shape = num_classes, input_shape
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        for split, size in self.sizes.items():
            at_least(f"{split}_size", size, 1)

    def read(self, split: str) -> TensorImages:
        """Return images made from the seed."""
        log.warning("The %s images are synthetic: accuracy on them means nothing.", split)
        part = list(self.sizes).index(split)
        data = synthetic_images(
            self.sizes[split], self.num_classes, self.input_shape, self.seed, part
        )
        channels = self.input_shape[0]
        return TensorImages(data, [0.5] * channels, [0.22] * channels)
