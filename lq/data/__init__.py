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
from lq.data.report import CalibrationReport
from lq.data.subset import CalibrationSubset, calibration_subset

__all__ = [
    "CIFAR10DataModule",
    "CIFAR100DataModule",
    "CalibrationReport",
    "CalibrationSubset",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "PublishedDataModule",
    "SyntheticDataModule",
    "calibration_subset",
]
