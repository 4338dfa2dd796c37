"""Real images and float weights, where they are: LQ_DATA, or ../shared/data from the repository.

python benchmarks/shared.py prints the top-1 of each float model beside the expected one.
"""

import csv
import io
import os
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

from lq.checkpoint import read_weights
from lq.data import DigitsDataModule
from lq.evaluation import evaluate
from lq.models import create_model, digits_cnn

FOLDER = Path(os.environ.get("LQ_DATA", Path(__file__).resolve().parents[1] / "../shared/data"))
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
LITE = (127 / 255,) * 3, (128 / 255,) * 3
Prepare = Callable[[Tensor], Tensor]


def require_data() -> Path:
    """Return the folder of real data, or end, saying that there is none."""
    if not (FOLDER / "cifar10").is_dir():
        print(f"Skipped: there is no data in {FOLDER}; set LQ_DATA.")
        sys.exit(0)
    return FOLDER


class Tiles(Dataset):
    """Images of one size, kept as bytes and prepared one by one as they are asked for.

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``.
        prepare: From a float image ``[C, H, W]`` in 0..1 to the input of a model.
    """

    def __init__(self, images: Tensor, labels: Tensor, prepare: Prepare) -> None:
        self.images, self.labels, self.prepare = images, labels, prepare

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.prepare(self.images[index] / 255), int(self.labels[index])


class ZippedImages(Dataset):
    """JPEG images read from within an archive, labelled by its ``labels.csv``."""

    def __init__(self, path: Path, prepare: Prepare, crop: bool) -> None:
        self.archive, self.prepare, self.crop = zipfile.ZipFile(path), prepare, crop
        with self.archive.open("labels.csv") as file:
            rows = csv.DictReader(io.TextIOWrapper(file))
            self.rows = [(row["file"], int(row["label"])) for row in rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name, label = self.rows[index]
        image = Image.open(io.BytesIO(self.archive.read(name))).convert("RGB")
        image = centre(image, 224) if self.crop else image.resize((224, 224), Image.BICUBIC)
        return self.prepare(torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255), label


def trained_digits(data: DigitsDataModule, epochs: int) -> nn.Module:
    """Return a small net, trained for a few epochs on handwritten digits."""
    torch.manual_seed(0)
    data.setup("fit")
    model = digits_cnn()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(epochs):
        for x, target in data.train_dataloader():
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), target).backward()
            optimizer.step()
    return model.eval()


def centre(image: Image.Image, size: int) -> Image.Image:
    """Return the middle of an image, `size` pixels high and wide."""
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def normalized(statistics: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET) -> Prepare:
    """Return the preparation that subtracts the mean and divides by the standard deviation."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return lambda image: (image - mean) / std


def rotated(image: Tensor) -> Tensor:
    """Return an image in -1..1, turned by 180 degrees."""
    return torch.flip(normalized(HALF)(image), (1, 2))


def rotated_96(image: Tensor) -> Tensor:
    """Return a small image in -1..1, at 96 pixels, turned by 180 degrees."""
    large = nn.functional.interpolate(image[None], size=(96, 96), mode="bilinear")
    return rotated(large[0])


def cifar10(split: str, prepare: Prepare | None = None) -> Tiles:
    """Return the images of ``train`` (50,000) or ``test`` (5,000), for a CIFAR ResNet unless told.

    Args:
        split: ``"train"`` or ``"test"``.
        prepare: How to prepare an image; ``None`` normalizes by ImageNet's statistics.
    """
    folder = require_data() / "cifar10"
    files = [f"train_{i}" for i in range(1, 6)] if split == "train" else ["test_first5000"]
    images = torch.cat([_tiles(folder / f"{name}.webp") for name in files])
    labels = np.load(folder / "labels.npz")
    key = next(k for k in labels.files if k.startswith(split))
    return Tiles(images, torch.from_numpy(labels[key].astype(np.int64)), prepare or normalized())


def _tiles(path: Path) -> Tensor:
    sheet = np.asarray(Image.open(path).convert("RGB"))
    rows = sheet.shape[0] // 32
    tiles = sheet.reshape(rows, 32, 100, 32, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, 32, 32)
    return torch.from_numpy(tiles.copy())


def photographs(split: str, prepare: Prepare) -> ZippedImages:
    """Return 500 photographs of ImageNet's classes.

    ``train`` are those of sample1k, to calibrate and tune with; ``test`` those of nips2017dev.
    """
    name = "sample1k" if split == "train" else "nips2017dev"
    return ZippedImages(require_data() / "imagenet" / f"{name}.zip", prepare, split == "train")


@dataclass(frozen=True)
class Case:
    """A published float model and the images it is measured on.

    Attributes:
        factory: Dotted name of what builds it.
        arguments: Its arguments.
        weights: File of its weights.
        images: ``cifar10`` or ``photographs``.
        prepare: How it wants its images.
        top1: Float top-1 to expect on these test images, 0..1.
    """

    factory: str
    arguments: dict[str, object]
    weights: str
    images: Callable[[str, Prepare], Dataset]
    prepare: Prepare
    top1: float

    def model(self) -> nn.Module:
        """Return the float model in eval mode."""
        model = create_model(self.factory, **self.arguments)
        model.load_state_dict(read_weights(require_data() / "weights" / self.weights))
        return model.eval()

    def data(self, split: str, count: int | None = None) -> Dataset:
        """Return the ``train`` or ``test`` images; only `count` of them, from a fixed shuffle."""
        images = self.images(split, self.prepare)
        if count is None:
            return images
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return Subset(images, order[:count].tolist())


CASES = {
    "resnet20": Case(
        "lq.models.resnet20", {}, "resnet20_cifar10.safetensors", cifar10, normalized(), 0.9148
    ),
    "resnet56": Case(
        "lq.models.resnet56", {}, "resnet56_cifar10.safetensors", cifar10, normalized(), 0.9296
    ),
    "mobilenet_v2_cifar": Case(
        "torchvision.models.mobilenet_v2",
        {"num_classes": 10},
        "mobilenet_v2_cifar10_96px_rot180.safetensors",
        cifar10,
        rotated_96,
        0.83,
    ),
    "mobilenet_v2_imagenet": Case(
        "torchvision.models.mobilenet_v2",
        {},
        "mobilenet_v2_imagenet_rot180.safetensors",
        photographs,
        rotated,
        0.768,
    ),
    "efficientnet_lite0": Case(
        "timm.models.efficientnet.tf_efficientnet_lite0",
        {},
        "tf_efficientnet_lite0.safetensors",
        photographs,
        normalized(LITE),
        0.896,
    ),
}
"""Every model that accuracy is measured on, by name."""


def batches(data: Dataset, size: int = 128, shuffle: bool = False) -> DataLoader:
    """Return a loader; the order of a shuffled one is fixed by torch's seed."""
    return DataLoader(data, batch_size=size, shuffle=shuffle)


def right(predict: Callable[[Tensor], Tensor], data: DataLoader) -> Tensor:
    """Return which images are classified right, bool ``[N]``."""
    with torch.no_grad():
        return torch.cat([predict(x).argmax(1) == target for x, target in data])


def paired_difference(before: Tensor, after: Tensor) -> tuple[float, float]:
    """Return the mean difference of top-1 on the same images, and half its 95 % interval."""
    difference = after.double() - before.double()
    return float(difference.mean()), 1.96 * float(difference.std()) / len(difference) ** 0.5


def main() -> None:
    for name, case in CASES.items():
        result = evaluate(case.model(), batches(case.data("test"), 50))
        print(f"{name}: float {result.top1:.2%} of {result.n} images, expected {case.top1:.2%}")


if __name__ == "__main__":
    main()
