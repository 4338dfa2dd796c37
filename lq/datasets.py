"""Labelled images in memory and on disk: readers of the standard layouts, without Lightning."""

from __future__ import annotations

import copy
import gzip
import hashlib
import pickle
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

if TYPE_CHECKING:
    from typing_extensions import Self

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
Sample = tuple[Tensor, int]
Transform = Callable[[Image.Image], Tensor]


class LabelledImages(NamedTuple):
    """Images as uint8 ``[N, C, H, W]`` and their labels as int64 ``[N]``."""

    images: Tensor
    labels: Tensor

    def at(self, indices: Tensor) -> LabelledImages:
        """Return a part."""
        return LabelledImages(self.images[indices], self.labels[indices])


class ImageDataset(Dataset[Sample]):
    """Labelled images, ready for a model."""

    def __len__(self) -> int:
        raise NotImplementedError

    def augmented(self) -> Self:
        """Return the same images as training sees them: changed at random each time."""
        raise NotImplementedError


class TensorImages(ImageDataset):
    """Images held as uint8 and normalized when they are asked for, a batch at a time.

    ``(image / peak - mean) / std``

    Args:
        data: Images and labels.
        mean: Mean of each channel, of values in 0..1.
        std: Standard deviation of each channel, of values in 0..1.
        peak: The brightest value in the images.
    """

    def __init__(
        self,
        data: LabelledImages,
        mean: Sequence[float],
        std: Sequence[float],
        peak: float = 255.0,
    ) -> None:
        self.images, self.labels = data
        self.mean, self.std = torch.tensor(mean).view(-1, 1, 1), torch.tensor(std).view(-1, 1, 1)
        self.peak, self.padding = peak, 0

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Sample]:
        images = self.images[indices]
        if self.padding:
            images = random_crop_flip(images, self.padding)
        images = (images / self.peak - self.mean) / self.std
        return list(zip(images.unbind(), self.labels[indices].tolist(), strict=True))

    def augmented(self) -> Self:
        """Return the images cropped at random with 4 pixels of padding, half of them mirrored."""
        other = copy.copy(self)
        other.padding = 4
        return other


def random_crop_flip(images: Tensor, padding: int) -> Tensor:
    """Return each image of ``[N, C, H, W]`` moved by up to `padding` pixels, half of them mirrored.

    The usual augmentation of CIFAR (He et al. 2016, section 4.2). What comes in at the border is 0.
    """
    n, channels, height, width = images.shape
    padded = F.pad(images, [padding] * 4)
    shift = torch.randint(0, 2 * padding + 1, (2, n, 1))
    rows, columns = shift[0] + torch.arange(height), shift[1] + torch.arange(width)
    columns = torch.where(torch.rand(n, 1) < 0.5, columns.flip(1), columns)
    image = torch.arange(n).view(n, 1, 1, 1)
    channel = torch.arange(channels).view(1, channels, 1, 1)
    return padded[image, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


class FolderImages(ImageDataset):
    """Images in a folder for each class, read when they are asked for.

    Args:
        folder: Folder that holds the class folders.
        classes: Names of the class folders; a name's position is its label.
        transform: Makes a tensor of an RGB image.
        train_transform: Does so for training.

    Raises:
        ValueError: If `folder` holds a class that is not in `classes`, or no images.
    """

    def __init__(
        self,
        folder: Path,
        classes: list[str],
        transform: Transform,
        train_transform: Transform,
    ) -> None:
        from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

        unknown = [name for name in class_folders(folder) if name not in classes]
        if unknown:
            raise ValueError(
                f"Expected the classes in {str(folder)!r} to be those of training, but "
                f"{unknown[0]!r} is not among them; remove it or add it to the training images."
            )
        numbered = {name: label for label, name in enumerate(classes)}
        self.samples: list[tuple[str, int]] = make_dataset(
            str(folder), numbered, extensions=IMG_EXTENSIONS, allow_empty=True
        )
        if not self.samples:
            raise ValueError(
                f"Expected images in the class folders of {str(folder)!r}, but found none; "
                f"known are {', '.join(IMG_EXTENSIONS)}."
            )
        self.transform, self.train_transform = transform, train_transform

    def copies_in(self, other: FolderImages, indices: Sequence[int]) -> list[int]:
        """Return those of some images whose files another folder holds too, byte for byte.

        Only files of a size that occurs on both sides are read.
        """
        mine = [Path(self.samples[i][0]) for i in indices]
        sizes = {path.stat().st_size for path in mine}
        theirs = {
            _file_digest(path)
            for path in (Path(path) for path, _ in other.samples)
            if path.stat().st_size in sizes
        }
        return [i for i, path in zip(indices, mine, strict=True) if _file_digest(path) in theirs]

    @property
    def labels(self) -> Tensor:
        """Labels, int64 ``[N]``, without reading an image."""
        return torch.tensor([label for _, label in self.samples])

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        path, label = self.samples[index]
        return self.transform(read_rgb(path)), label

    def augmented(self) -> Self:
        """Return the images as `train_transform` makes them."""
        other = copy.copy(self)
        other.transform = self.train_transform
        return other


def _file_digest(path: Path) -> bytes:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


def class_folders(folder: Path) -> list[str]:
    """Return the names of the class folders in a folder, sorted; hidden ones do not count.

    Raises:
        FileNotFoundError: If there are none.
    """
    names = [f.name for f in folder.iterdir() if f.is_dir()] if folder.is_dir() else []
    names = sorted(name for name in names if not name.startswith("."))
    if not names:
        raise FileNotFoundError(
            f"Expected a folder for each class in {str(folder)!r}, but there is "
            f"{'none in it' if folder.is_dir() else 'no such folder'}; `root` holds train/ and "
            "val/, and each of them a folder of images for each class."
        )
    return names


def read_rgb(path: str) -> Image.Image:
    """Return an image file as RGB.

    Raises:
        ValueError: If the file cannot be decoded.
    """
    try:
        with Image.open(path) as image:
            rgb: Image.Image = image.convert("RGB")
            return rgb
    except (
        OSError,
        ValueError,
        SyntaxError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        raise ValueError(
            f"Expected {path!r} to be an image, but it cannot be read: "
            f"{' '.join(str(error).split())}; remove or replace the file."
        ) from None


class _Refused(pickle.UnpicklingError):
    """The file names something that is not an array."""


class _Opaque:
    """Stands in for every numpy object in a pickle: keeps what the file says and does nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _encode(text: str, encoding: str) -> bytes:
    """Stand in for ``codecs.encode``, by which Python 3 writes bytes in old pickles."""
    if encoding != "latin1":
        raise _Refused(f"bytes encoded as {encoding!r}")
    return text.encode("latin1")


class _Unpickler(pickle.Unpickler):
    """Reads containers, strings, numbers and arrays of numbers; calls nothing of the file's."""

    def find_class(self, module: str, name: str) -> Any:
        """Return the stand-in for a name, and refuse all but those of numpy's arrays."""
        if (module, name) == ("_codecs", "encode"):
            return _encode
        array = name in ("ndarray", "dtype", "_reconstruct", "_frombuffer")
        if array and module.split(".")[0] == "numpy":
            return _Opaque
        raise _Refused(f"{module}.{name}")


def read_pickle(path: Path) -> dict[str, Any]:
    """Return a pickled dict of bytes, strings, numbers, lists and arrays of numbers.

    The file is not trusted: whatever it names beyond numpy's arrays is refused, not run, and the
    arrays themselves are built here from their bytes (pickle's "Restricting Globals").

    Raises:
        ValueError: If the file is damaged or holds anything else.
    """
    try:
        with path.open("rb") as file:
            values = _Unpickler(file, encoding="bytes").load()
        return {k.decode() if isinstance(k, bytes) else k: _array(v) for k, v in values.items()}
    except _Refused as error:
        raise ValueError(
            f"Expected {str(path)!r} to hold arrays and plain values only, but found {error}; "
            "nothing of it was run; unpack the original archive again."
        ) from None
    except Exception as error:  # A damaged pickle raises almost anything.
        raise _damaged(path, error) from None


def _array(value: Any) -> Any:
    """Return the array that a stand-in describes, and other values as they are."""
    if not isinstance(value, _Opaque):
        return value
    if value.state is not None:  # From _reconstruct.
        _version, shape, dtype, fortran, data = value.state
    else:  # From _frombuffer, since pickle protocol 5.
        data, dtype, shape, order = value.args[:4]
        fortran = order == "F"
    kind = dtype.args[0]
    kind = kind.decode() if isinstance(kind, bytes) else kind
    if kind not in ("u1", "i4", "i8"):
        raise _Refused(f"an array of type {kind!r}")
    return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")


def _damaged(path: Path, reason: Exception | str) -> ValueError:
    text = " ".join(str(reason).split()) or type(reason).__name__
    if isinstance(reason, KeyError):
        text = f"there is no {text}"
    return ValueError(
        f"Expected {str(path)!r} to be as published, but it is damaged: {text}; "
        "unpack the original archive again."
    )


def read_cifar(folder: Path, files: Sequence[str], num_classes: int) -> LabelledImages:
    """Return the images in some batches of CIFAR-10 or CIFAR-100 ("python version").

    Args:
        folder: ``cifar-10-batches-py`` or ``cifar-100-python``.
        files: Names of the batches.
        num_classes: 10, or 100 for the fine labels of CIFAR-100.

    Raises:
        ValueError: If a file is missing, damaged or holds more than images and labels.
    """
    parts = []
    for path in (folder / file for file in files):
        batch = read_pickle(path)
        try:
            images = torch.tensor(np.asarray(batch["data"], np.uint8)).view(-1, 3, 32, 32)
            labels = batch["labels" if num_classes == 10 else "fine_labels"]
            part = LabelledImages(images, torch.tensor(labels, dtype=torch.int64))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise _damaged(path, error) from None
        _check(path, part, num_classes)
        parts.append(part)
    images, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return LabelledImages(images, labels)


def _check(path: Path, data: LabelledImages, num_classes: int) -> None:
    if data.labels.dim() != 1 or len(data.images) != len(data.labels):
        raise _damaged(path, f"{len(data.images)} images and {data.labels.numel()} labels")
    if len(data.labels) and not 0 <= int(data.labels.min()) <= int(data.labels.max()) < num_classes:
        raise _damaged(path, f"labels outside 0..{num_classes - 1}")


def read_fashion_mnist(folder: Path, split: str) -> LabelledImages:
    """Return Fashion-MNIST's images from its idx files, packed (``.gz``) or not.

    Args:
        folder: ``FashionMNIST/raw``.
        split: ``"train"`` or ``"t10k"``.

    Raises:
        ValueError: If a file is missing or damaged.
    """
    images = read_idx(folder / f"{split}-images-idx3-ubyte", dimensions=3)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte", dimensions=1)
    data = LabelledImages(images.unsqueeze(1), labels.long())
    _check(folder, data, 10)
    return data


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Return what an idx file, or else ``path.gz``, holds: a magic number, sizes, bytes."""
    packed = path.with_name(path.name + ".gz")
    try:
        data = path.read_bytes() if path.is_file() else gzip.decompress(packed.read_bytes())
        magic, *shape = struct.unpack_from(f">{dimensions + 1}I", data)
        if magic != 0x800 + dimensions:
            raise ValueError(f"it begins with {magic} instead of {0x800 + dimensions}")
        values = np.frombuffer(data, np.uint8, offset=4 * (dimensions + 1)).reshape(shape)
    except (OSError, EOFError, zlib.error, struct.error, ValueError) as error:
        raise _damaged(path, error) from None
    return torch.tensor(values)


def read_digits() -> LabelledImages:
    """Return scikit-learn's 1797 handwritten digits, 8x8 pixels of 0..16."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.uint8).unsqueeze(1)
    return LabelledImages(images, torch.tensor(digits.target, dtype=torch.int64))


def synthetic_images(
    count: int, num_classes: int, shape: tuple[int, int, int], seed: int, part: int
) -> LabelledImages:
    """Return made-up images: a smooth random pattern for each class, under noise.

    Args:
        count: How many.
        num_classes: Number of classes.
        shape: Channels, height and width.
        seed: Fixes the patterns.
        part: Fixes the labels and the noise, so that parts of one seed share the patterns.
    """
    channels, height, width = shape
    patterns = torch.randn(
        num_classes, channels, 4, 4, generator=torch.Generator().manual_seed(seed)
    )
    patterns = F.interpolate(patterns, (height, width), mode="bilinear", align_corners=False)
    generator = torch.Generator().manual_seed(seed * 1000 + part + 1)
    labels = torch.randint(num_classes, (count,), generator=generator)
    noise = torch.randn(count, *shape, generator=generator)
    images = 127.5 + 40 * patterns[labels] + 40 * noise
    return LabelledImages(images.round().clamp(0, 255).to(torch.uint8), labels)
