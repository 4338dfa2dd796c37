"""Published data sets of small images, as they lie on disk: CIFAR-10, CIFAR-100, Fashion-MNIST."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from lq.data.base import ImageDataModule, at_least
from lq.data.strategies import seeded_order
from lq.datasets import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    LabelledImages,
    TensorImages,
    read_cifar,
    read_fashion_mnist,
)

log = logging.getLogger(__name__)


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
        at_least("val_size", val_size, 1)
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
            order = seeded_order(len(data.labels), self.seed)
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
