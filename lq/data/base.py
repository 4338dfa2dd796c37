"""What all data modules share: splits, loaders, and images for calibration."""

from __future__ import annotations

import logging

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from lq.data.subset import CalibrationSubset, calibration_subset, check_strategy
from lq.datasets import ImageDataset, Sample

log = logging.getLogger(__name__)
_SPLITS = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class ImageDataModule(L.LightningDataModule):
    """Labelled images for training, validation, test and calibration.

    Splits and calibration images depend on `seed` alone; the order of training images and their
    augmentation follow ``seed_everything``. A subclass says how to read a split.

    Args:
        batch_size: Images in a batch.
        num_workers: Processes that load images; 0 loads them in the main process.
        calibration_size: How many training images calibration sees.
        calibration_strategy: How they are chosen: ``random``, ``stratified`` (each class in its
            share) or ``coverage`` (as different from each other as can be).
        seed: Fixes the splits and the calibration images.

    Attributes:
        num_classes: Number of classes.
        input_shape: Channels, height and width of an image.
        name: Name for reports.
    """

    input_shape: tuple[int, int, int]
    augment = False

    def __init__(
        self,
        batch_size: int = 64,
        num_workers: int = 0,
        calibration_size: int = 256,
        seed: int = 0,
        calibration_strategy: str = "random",
    ) -> None:
        super().__init__()
        at_least("batch_size", batch_size, 1)
        at_least("num_workers", num_workers, 0)
        at_least("calibration_size", calibration_size, 1)
        self.batch_size, self.num_workers = batch_size, num_workers
        check_strategy(calibration_strategy)
        self.calibration_size, self.seed = calibration_size, seed
        self.calibration_strategy = calibration_strategy
        self._datasets: dict[str, ImageDataset] = {}
        self._calibration: CalibrationSubset | None = None
        self.save_hyperparameters()

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        raise NotImplementedError

    def read(self, split: str) -> ImageDataset:
        """Return the images of ``"train"``, ``"val"`` or ``"test"``, not augmented."""
        raise NotImplementedError

    def dataset(self, split: str) -> ImageDataset:
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
        images = self.dataset("train")
        return self._loader(images.augmented() if self.augment else images, shuffle=True)

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
        """Return `calibration_size` training images, not augmented, always the same ones.

        ``calibration_dataloader().dataset.report()`` tells what they look like.
        """
        return self._loader(self.calibration_dataset())

    def calibration_dataset(self) -> CalibrationSubset:
        """Return the images of ``calibration_dataloader``, chosen once."""
        if self._calibration is None:
            images = self.dataset("train")
            if len(images) < self.calibration_size:
                log.warning(
                    "Calibration sees all %d training images of %s.", len(images), self.name
                )
            chosen = calibration_subset(
                images,
                min(self.calibration_size, len(images)),
                self.calibration_strategy,
                self.seed,
                num_workers=self.num_workers,
            )
            self.refuse_held_out(chosen)
            self._calibration = chosen
        return self._calibration

    def refuse_held_out(self, chosen: CalibrationSubset) -> None:
        """Raise a ``ValueError`` if calibration images are validated or tested on too.

        Splits that are parts of one data set share none; those that are stored apart may.
        """

    def _loader(self, images: Dataset[Sample], shuffle: bool = False) -> DataLoader[Sample]:
        return DataLoader(
            images,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def at_least(name: str, value: int, least: int) -> None:
    """Raise a ``ValueError`` for a number that is too small."""
    if value < least:
        raise ValueError(f"Expected `{name}` to be at least {least}, but got {value}.")
