"""Data modules that also serve images for calibration: training images, not augmented."""

from lq.data.base import ImageDataModule
from lq.data.builtin import DigitsDataModule, SyntheticDataModule
from lq.data.folder import ImageFolderDataModule
from lq.data.published import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    FashionMNISTDataModule,
    PublishedDataModule,
)

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "PublishedDataModule",
    "SyntheticDataModule",
]
