"""Data modules that also serve images for calibration: training images, not augmented."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lq.datasets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FolderImages,
    LabelledImages,
    Sample,
    TensorImages,
    class_folders,
    read_cifar,
    read_digits,
    read_fashion_mnist,
    synthetic_images,
)

log = logging.getLogger(__name__)
Images = TensorImages | FolderImages
ImagesT = TypeVar("ImagesT", TensorImages, FolderImages)
_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class ImageDataModule(L.LightningDataModule):
    """Labelled images for training, validation, test and calibration.

    Splits and calibration images depend on `seed` alone; the order of training images and their
    augmentation follow ``seed_everything``. A subclass says how to get the images of a split and,
    where it augments, how.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load images; 0 loads them in the main process.
        calibration_size: How many training images calibration sees.
        seed: Fixes the splits and the calibration images.

    Attributes:
        num_classes: Number of classes.
        input_shape: Channels, height and width of an image.
        name: Name for reports.
    """

    input_shape: tuple[int, int, int]

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        calibration_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _at_least("batch_size", batch_size, 1)
        _at_least("num_workers", num_workers, 0)
        _at_least("calibration_size", calibration_size, 1)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.calibration_size, self.seed = calibration_size, seed
        self._datasets: dict[str, Images] = {}
        self.save_hyperparameters()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        raise NotImplementedError

    def read(self, split: str) -> Images:
        """Return the images of ``"train"``, ``"val"`` or ``"test"``, not augmented."""
        raise NotImplementedError

    def augmented(self, images: Images) -> Images:
        """Return training images as training sees them."""
        return images

    def dataset(self, split: str) -> Images:
        """Return the images of a split, not augmented, read once.

        Raises:
            FileNotFoundError: If they are not on disk.
            ValueError: If there are none, or a file is damaged.
        """
        if split not in self._datasets:
            images = self.read(split)
            if len(images) == 0:
                raise ValueError(
                    f"Expected the {split} images of {self.name} to be at least one, but got none."
                )
            self._datasets[split] = images
        return self._datasets[split]

    def setup(self, stage: str | None = None) -> None:
        """Read the images that a stage needs, so that what is missing is found at once."""
        for split in _SPLITS.get(stage or "", ("train", "val", "test")):
            self.dataset(split)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the training images, augmented, in random order."""
        return self._loader(self.augmented(self.dataset("train")), shuffle=True)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return the validation images."""
        return self._loader(self.dataset("val"))

    def test_dataloader(self) -> DataLoader[Sample]:
        """Return the test images."""
        return self._loader(self.dataset("test"))

    def predict_dataloader(self) -> DataLoader[Sample]:
        """Return the test images, with their labels."""
        return self.test_dataloader()

    def calibration_dataloader(self) -> DataLoader[Sample]:
        """Return `calibration_size` training images, not augmented, always the same ones."""
        images = self.dataset("train")
        if len(images) < self.calibration_size:
            log.warning("Calibration sees all %d training images of %s.", len(images), self.name)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(self.seed))
        return self._loader(Subset(images, order[: self.calibration_size].tolist()))

    def _loader(self, images: Dataset[Sample], shuffle: bool = False) -> DataLoader[Sample]:
        return DataLoader(
            images,
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"Expected `{name}` to be at least {least}, but got {value}.")


def _parts(data: LabelledImages, *sizes: int, seed: int) -> list[LabelledImages]:
    """Return random parts of the given sizes, drawn by `seed` alone."""
    order = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(seed))
    return [data.at(part) for part in order.split(list(sizes))]


class DigitsDataModule(ImageDataModule):
    """Handwritten digits, 8x8, from scikit-learn: nothing to download.

    Of 1797 images 1197 train, 200 validate and 400 test; each class has its share of each.

    Args:
        kwargs: Arguments of ``ImageDataModule``.

    Example:
        >>> images, labels = next(iter(DigitsDataModule(batch_size=4).calibration_dataloader()))
        >>> images.shape, labels.shape
        (torch.Size([4, 1, 8, 8]), torch.Size([4]))
    """

    name = "digits"
    num_classes = 10
    input_shape = (1, 8, 8)

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

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


class _PublishedDataModule(ImageDataModule):
    """A published data set with a training and a test part, on disk.

    Args:
        root: Folder that holds the data set's folder.
        download: Download the data set in ``prepare_data`` if it is not there.
        augment: Train on random crops (4 pixels of padding) and horizontal flips.
        val_size: How many training images validate instead, at most a fifth of them.
        mean: Mean of each channel, of values in 0..1.
        std: Standard deviation of each channel, of values in 0..1.
        kwargs: Arguments of ``ImageDataModule``.
    """

    title: str
    folder: str
    archive: str

    def __init__(
        self,
        root: str,
        download: bool,
        augment: bool,
        val_size: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        **kwargs: Any,
    ) -> None:
        root = str(root)
        super().__init__(**kwargs)
        _at_least("val_size", val_size, 1)
        self.root, self.download, self.augment = Path(root), download, augment
        self.val_size, self.mean, self.std = val_size, mean, std

    def read_part(self, train: bool) -> LabelledImages:
        """Return the training or the test images as they were published."""
        raise NotImplementedError

    def fetch(self) -> None:
        """Download the data set."""
        raise NotImplementedError

    def prepare_data(self) -> None:
        """Download the data set if that was asked for and it is not there."""
        if self.download:
            try:
                self.read_part(train=True), self.read_part(train=False)
            except FileNotFoundError:
                self.fetch()

    def read(self, split: str) -> TensorImages:
        """Return the test images, or a part of the training images."""
        try:
            data = self.read_part(train=split != "test")
        except FileNotFoundError as error:
            remedy = "call prepare_data()" if self.download else "pass download=True"
            raise FileNotFoundError(
                f"Expected {self.title} in {str(self.root / self.folder)!r}, but there is no "
                f"{Path(str(error)).name}; {remedy} to download it, or unpack {self.archive}."
            ) from None
        if split != "test":
            size = min(self.val_size, len(data.labels) // 5)
            if size < self.val_size:
                log.warning("%s validates on %d images instead of %d.", self.name, size, self.val_size)
            train, val = _parts(data, len(data.labels) - size, size, seed=self.seed)
            data = train if split == "train" else val
        return TensorImages(data, self.mean, self.std)
