"""Data modules that also serve images for calibration: training images, not augmented."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lq.datasets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    FolderImages,
    ImageDataset,
    LabelledImages,
    Sample,
    TensorImages,
    Transform,
    class_folders,
    read_cifar,
    read_digits,
    read_fashion_mnist,
    synthetic_images,
)

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
    ) -> None:
        super().__init__()
        _at_least("batch_size", batch_size, 1)
        _at_least("num_workers", num_workers, 0)
        _at_least("calibration_size", calibration_size, 1)
        self.batch_size, self.num_workers = batch_size, num_workers
        self.calibration_size, self.seed = calibration_size, seed
        self._datasets: dict[str, ImageDataset] = {}
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
        """Return `calibration_size` training images, not augmented, always the same ones."""
        images = self.dataset("train")
        if len(images) < self.calibration_size:
            log.warning("Calibration sees all %d training images of %s.", len(images), self.name)
        chosen = _order(len(images), self.seed)[: self.calibration_size]
        return self._loader(Subset(images, chosen.tolist()))

    def _loader(self, images: Dataset[Sample], shuffle: bool = False) -> DataLoader[Sample]:
        return DataLoader(
            images,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"Expected `{name}` to be at least {least}, but got {value}.")


def _order(count: int, seed: int) -> Tensor:
    """Return ``0 ... count - 1`` in an order that `seed` alone fixes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


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


class PublishedDataModule(ImageDataModule):
    """A published data set of small images, on disk as it is downloaded.

    Args:
        root: Folder that holds the data set's folder.
        download: Download the data set in ``prepare_data`` if it is not there.
        augment: Train on random crops (4 pixels of padding) and horizontal flips.
        val_size: How many training images validate instead, at most a fifth of them.
        mean: Mean of each channel, of values in 0..1; None for the usual one: for CIFAR ImageNet's.
        std: Standard deviation of each channel, likewise.
        kwargs: Arguments of ``ImageDataModule``.
    """

    folder: str
    by_hand: str
    ends: tuple[str, ...] = ("",)
    files: ClassVar[Mapping[str, Sequence[str]]]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        root: str = "data",
        download: bool = False,
        augment: bool = True,
        val_size: int = 5000,
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
        **kwargs: Any,
    ) -> None:
        root = str(root)  # Hyperparameters are plain values.
        super().__init__(**kwargs)
        _at_least("val_size", val_size, 1)
        self.root, self.download, self.augment, self.val_size = root, download, augment, val_size
        self.mean, self.std = mean or self.mean, std or self.std
        for given in (self.mean, self.std):
            if len(given) != self.input_shape[0]:
                raise ValueError(
                    f"Expected `mean` and `std` to have {self.input_shape[0]} values, one for each "
                    f"channel, but got {given!r}."
                )

    def read_part(self, part: str) -> LabelledImages:
        """Return the ``"train"`` or ``"test"`` images as they were published."""
        raise NotImplementedError

    def fetch(self) -> None:
        """Download the data set."""
        raise NotImplementedError

    def missing(self, part: str) -> list[str]:
        """Return the files of a part that are not on disk."""
        folder, files = Path(self.root, self.folder), self.files[part]
        return [f for f in files if not any((folder / f"{f}{end}").is_file() for end in self.ends)]

    def prepare_data(self) -> None:
        """Download the data set if that was asked for and it is not there."""
        if self.download and (self.missing("train") or self.missing("test")):
            self.fetch()

    def read(self, split: str) -> TensorImages:
        """Return the test images, or a part of the training images."""
        part = "test" if split == "test" else "train"
        if missing := self.missing(part):
            ask = "call prepare_data()" if self.download else "pass download=True"
            raise FileNotFoundError(
                f"Expected {self.name} in {str(Path(self.root, self.folder))!r}, but there is no "
                f"{missing[0]!r}; {ask} to download it, or {self.by_hand}."
            )
        data = self.read_part(part)
        if part == "train":
            size = min(self.val_size, len(data.labels) // 5)
            if size < self.val_size and split == "val":
                log.warning("Of %s only %d images validate, a fifth.", self.name, size)
            order = _order(len(data.labels), self.seed)
            data = data.at(order[size:] if split == "train" else order[:size])
        return TensorImages(data, self.mean, self.std)


class CIFAR10DataModule(PublishedDataModule):
    """CIFAR-10: 60000 photographs of 32x32 pixels in 10 classes.

    Reads ``root/cifar-10-batches-py``, the "python version" of the data set.
    """

    name = "cifar10"
    num_classes = 10
    input_shape = (3, 32, 32)
    folder = "cifar-10-batches-py"
    by_hand = "unpack cifar-10-python.tar.gz into `root`"
    files: ClassVar[Mapping[str, Sequence[str]]] = {
        "train": [f"data_batch_{i}" for i in range(1, 6)],
        "test": ["test_batch"],
    }
    mean = IMAGENET_MEAN  # As the published CIFAR ResNets expect.
    std = IMAGENET_STD

    def read_part(self, part: str) -> LabelledImages:
        """Return the images of some batches."""
        return read_cifar(Path(self.root, self.folder), self.files[part], self.num_classes)

    def fetch(self) -> None:
        """Download the archive, compare its checksum, and unpack it."""
        from torchvision.datasets import CIFAR10, CIFAR100
        from torchvision.datasets.utils import download_and_extract_archive

        # Not CIFAR10(download=True): that unpickles what it finds.
        source = CIFAR10 if self.num_classes == 10 else CIFAR100
        download_and_extract_archive(
            source.url, self.root, filename=source.filename, md5=source.tgz_md5
        )


class CIFAR100DataModule(CIFAR10DataModule):
    """CIFAR-100: 60000 photographs of 32x32 pixels in 100 classes, the fine labels.

    Reads ``root/cifar-100-python``, the "python version" of the data set.
    """

    name = "cifar100"
    num_classes = 100
    folder = "cifar-100-python"
    by_hand = "unpack cifar-100-python.tar.gz into `root`"
    files: ClassVar[Mapping[str, Sequence[str]]] = {"train": ["train"], "test": ["test"]}


class FashionMNISTDataModule(PublishedDataModule):
    """Fashion-MNIST: 70000 grey pictures of clothes, 28x28 pixels in 10 classes.

    Reads ``root/FashionMNIST/raw``, packed (``.gz``) or not.
    """

    name = "fashion_mnist"
    num_classes = 10
    input_shape = (1, 28, 28)
    folder = "FashionMNIST/raw"
    by_hand = "put its four idx files (.gz) there"
    ends = ("", ".gz")
    files: ClassVar[Mapping[str, Sequence[str]]] = {
        "train": ["train-images-idx3-ubyte", "train-labels-idx1-ubyte"],
        "test": ["t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"],
    }
    mean = (0.2860,)
    std = (0.3530,)

    def read_part(self, part: str) -> LabelledImages:
        """Return the images of two idx files."""
        prefix = "train" if part == "train" else "t10k"
        return read_fashion_mnist(Path(self.root, self.folder), prefix)

    def fetch(self) -> None:
        """Download the four files, comparing their checksums."""
        from torchvision.datasets import FashionMNIST

        FashionMNIST(self.root, download=True)


class ImageFolderDataModule(ImageDataModule):
    """Images in a folder for each class: ``root/train/cat/1.jpg``; ImageNet's layout.

    ``root`` holds ``train`` and ``val``, and may hold ``test``; without it the images of ``val``
    are the test images too. The class folders of ``train``, or of ``val`` where only evaluation
    is wanted, give the classes, in alphabetical order.

    Args:
        root: Folder that holds ``train`` and ``val``.
        image_size: Height and width of the images that the model sees.
        crop: Show the middle of the image, its short side scaled to 256/224 of `image_size`;
            otherwise the whole image, scaled to a square.
        augment: Train on random crops of random scale and horizontal flips.
        mean: Mean of each channel, of values in 0..1.
        std: Standard deviation of each channel.
        num_workers: Processes that load images; as many as there are cores is a good number.
        kwargs: Arguments of ``ImageDataModule``.
    """

    def __init__(
        self,
        root: str = "data",
        image_size: int = 224,
        crop: bool = True,
        augment: bool = True,
        mean: tuple[float, float, float] = IMAGENET_MEAN,
        std: tuple[float, float, float] = IMAGENET_STD,
        num_workers: int = 2,
        **kwargs: Any,
    ) -> None:
        root = str(root)
        super().__init__(num_workers=num_workers, **kwargs)
        _at_least("image_size", image_size, 1)
        self.root, self.name = root, Path(root).resolve().name
        self.input_shape = (3, image_size, image_size)
        self.crop, self.augment, self.mean, self.std = crop, augment, mean, std

    @property
    def classes(self) -> list[str]:
        """Names of the classes; a label is a position among them."""
        train = Path(self.root, "train")
        return class_folders(train if train.is_dir() else Path(self.root, "val"))

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(self.classes)

    def read(self, split: str) -> FolderImages:
        """Return the images in the folder of a split."""
        folder = Path(self.root, split)
        if split == "test" and not folder.is_dir():
            log.info("%s has no test folder; its val images are the test images.", self.name)
            folder = Path(self.root, "val")
        return FolderImages(folder, self.classes, self._transform(False), self._transform(True))

    def _transform(self, train: bool) -> Transform:
        from torchvision.transforms import v2

        size = self.input_shape[-1]
        if train:
            steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()]
        elif self.crop:
            steps = [v2.Resize(size * 256 // 224), v2.CenterCrop(size)]
        else:
            steps = [v2.Resize((size, size))]
        steps += [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
        transform: Transform = v2.Compose([*steps, v2.Normalize(self.mean, self.std)])
        return transform


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
        _at_least("num_classes", num_classes, 1)
        self.num_classes, self.input_shape = num_classes, input_shape
        self.sizes = {"train": train_size, "val": val_size, "test": test_size}
        for split, size in self.sizes.items():
            _at_least(f"{split}_size", size, 1)

    def read(self, split: str) -> TensorImages:
        """Return images made from the seed."""
        log.warning("The %s images are synthetic: accuracy on them means nothing.", split)
        part = list(self.sizes).index(split)
        data = synthetic_images(
            self.sizes[split], self.num_classes, self.input_shape, self.seed, part
        )
        channels = self.input_shape[0]
        return TensorImages(data, [0.5] * channels, [0.22] * channels)
