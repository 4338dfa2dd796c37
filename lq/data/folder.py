"""Images in a folder for each class, as ImageNet is stored."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from lq.data.base import ImageDataModule, at_least
from lq.data.subset import CalibrationSubset
from lq.datasets import IMAGENET_MEAN, IMAGENET_STD, FolderImages, Transform, class_folders

log = logging.getLogger(__name__)


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
        at_least("image_size", image_size, 1)
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

    def refuse_held_out(self, chosen: CalibrationSubset) -> None:
        """Raise a ``ValueError`` if files of calibration images lie in ``val`` or ``test`` too."""
        images = self.dataset("train")
        assert isinstance(images, FolderImages)
        for split in ("val", "test"):
            folder = Path(self.root, split)
            if not folder.is_dir():
                continue
            others = self.dataset(split)
            assert isinstance(others, FolderImages)
            if copies := images.copies_in(others, chosen.indices):
                raise ValueError(
                    f"Expected the calibration images not to be in {str(folder)!r}, but "
                    f"{len(copies)} of {len(chosen)} are, the first as "
                    f"{images.samples[copies[0]][0]!r}; remove the copies."
                )

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
