import gzip
import inspect
import io
import logging
import os
import pickle
import struct
from typing import ClassVar

import jsonargparse
import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import RandomSampler, SequentialSampler

from lq import data as lq_data
from lq.data import (
    CIFAR10DataModule,
    CIFAR100DataModule,
    DigitsDataModule,
    FashionMNISTDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    SyntheticDataModule,
)
from lq.datasets import LabelledImages, TensorImages, random_crop_flip

SMALL = {"batch_size": 16, "calibration_size": 20, "val_size": 10}


class Python2Pickler(pickle._Pickler):
    """Writes strings and numpy's names as Python 2 and numpy 1 did in the published files."""

    def save_string(self, obj):
        data = obj if isinstance(obj, bytes) else obj.encode("latin1")
        self.write(pickle.BINSTRING + struct.pack("<i", len(data)) + data)
        self.memoize(obj)

    def save_global(self, obj, name=None):
        module = obj.__module__.replace("numpy._core", "numpy.core")
        self.write(pickle.GLOBAL + f"{module}\n{name or obj.__qualname__}\n".encode())
        self.memoize(obj)

    dispatch: ClassVar = {
        **pickle._Pickler.dispatch,
        bytes: save_string,
        str: save_string,
        type: save_global,
        type(lambda: 0): save_global,
    }


def published(values: dict) -> bytes:
    file = io.BytesIO()
    Python2Pickler(file, protocol=2).dump(values)
    return file.getvalue()


def batch(count: int, classes: int, seed: int, key: bytes = b"labels") -> dict:
    """Return a CIFAR batch in which every image is unique."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = rng.integers(0, classes, count).tolist()
    return {b"batch_label": b"training batch", key: labels, b"data": images}


@pytest.fixture
def cifar10(tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(published(batch(20, 10, seed=i)))
    (folder / "test_batch").write_bytes(published(batch(30, 10, seed=6)))
    return tmp_path


@pytest.fixture
def cifar100(tmp_path):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    for name, count in ("train", 100), ("test", 30):
        values = batch(count, 100, seed=count, key=b"fine_labels")
        values[b"coarse_labels"] = [0] * count
        (folder / name).write_bytes(published(values))
    return tmp_path


def idx(values: np.ndarray) -> bytes:
    return (
        struct.pack(f">{values.ndim + 1}I", 0x800 + values.ndim, *values.shape) + values.tobytes()
    )


@pytest.fixture
def fashion_mnist(tmp_path):
    folder = tmp_path / "FashionMNIST/raw"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, count in ("train", 100), ("t10k", 30):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
    return tmp_path


def pack(root):
    """Leave the idx files as they are downloaded."""
    for path in (root / "FashionMNIST/raw").iterdir():
        path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()


def make_folder(root, splits):
    """Write images of one random colour each, lossless."""
    rng = np.random.default_rng(0)
    for split, count in splits.items():
        for name in ("cat", "dog", "emu"):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = np.broadcast_to(rng.integers(0, 256, 3, dtype=np.uint8), (12, 16, 3))
                Image.fromarray(pixels.copy()).save(folder / f"{i}.png")
    return root


@pytest.fixture
def image_folder(tmp_path):
    root = make_folder(tmp_path / "pets", {"train": 10, "val": 4, "test": 2})
    (root / "train/.ipynb_checkpoints").mkdir()
    return root


FOLDER = {"batch_size": 16, "calibration_size": 20, "image_size": 8, "num_workers": 0}


def every_module(request, name: str, **more) -> ImageDataModule:
    """Return a small data module by name."""
    if name == "digits":
        return DigitsDataModule(batch_size=16, calibration_size=20, **more)
    if name == "synthetic":
        sizes = {"train_size": 40, "val_size": 10, "test_size": 10}
        return SyntheticDataModule(batch_size=16, calibration_size=20, **sizes, **more)
    root = request.getfixturevalue(name)
    if name == "image_folder":
        return ImageFolderDataModule(root, **FOLDER, **more)
    classes = {
        "cifar10": CIFAR10DataModule,
        "cifar100": CIFAR100DataModule,
        "fashion_mnist": FashionMNISTDataModule,
    }
    return classes[name](root=root, **SMALL, **more)


NAMES = ["digits", "cifar10", "cifar100", "fashion_mnist", "image_folder", "synthetic"]
each_module = pytest.mark.parametrize("name", NAMES)


def images_of(loader) -> torch.Tensor:
    return torch.cat([images for images, _ in loader])


def keys(images: torch.Tensor) -> list[bytes]:
    return [image.numpy().tobytes() for image in images]


@each_module
def test_serves_normalized_images_and_labels(request, name):
    module = every_module(request, name)
    for stage in ("fit", "validate", "test", "predict", None):
        module.setup(stage)
    loaders = ("train", "val", "test", "predict", "calibration")
    for loader in (getattr(module, f"{which}_dataloader")() for which in loaders):
        images, labels = next(iter(loader))
        assert images.shape[1:] == module.input_shape
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert int(labels.min()) >= 0
        assert int(labels.max()) < module.num_classes
        assert images.abs().max() < 4


@each_module
def test_seed_fixes_splits_and_calibration(request, name):
    first, again = every_module(request, name), every_module(request, name)
    other = every_module(request, name, seed=1)
    torch.manual_seed(0)
    expected = images_of(first.calibration_dataloader())
    torch.manual_seed(1)
    assert torch.equal(images_of(again.calibration_dataloader()), expected)
    assert torch.equal(images_of(again.calibration_dataloader()), expected)
    assert torch.equal(images_of(again.val_dataloader()), images_of(first.val_dataloader()))
    assert not torch.equal(images_of(other.calibration_dataloader()), expected)


@each_module
def test_calibration_sees_training_images_only(request, name):
    module = every_module(request, name)
    calibration = keys(images_of(module.calibration_dataloader()))
    module.augment = False
    train = set(keys(images_of(module.train_dataloader())))
    assert len(calibration) == 20
    assert set(calibration) <= train
    held_out = keys(images_of(module.val_dataloader()))
    held_out += keys(images_of(module.test_dataloader()))
    assert len(set(calibration)) == 20
    assert not set(held_out) & train


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion_mnist", "image_folder"])
def test_only_training_augments(request, name):
    module = every_module(request, name)
    for which in ("val", "test", "calibration"):
        loader = getattr(module, f"{which}_dataloader")
        assert isinstance(loader().sampler, SequentialSampler)
        assert torch.equal(images_of(loader()), images_of(loader()))
    loader = module.train_dataloader()
    assert isinstance(loader.sampler, RandomSampler)
    if name != "image_folder":  # Its images have one colour: any crop is the same.
        plain = keys(images_of(every_module(request, name, augment=False).train_dataloader()))
        assert len(set(plain) & set(keys(images_of(loader)))) < len(plain) / 4


def test_image_folder_crops_training_images_at_random(image_folder):
    pixels = np.arange(12 * 16 * 3, dtype=np.uint8).reshape(12, 16, 3)
    Image.fromarray(pixels).save(image_folder / "train/cat/0.png")
    images = ImageFolderDataModule(image_folder, **FOLDER).dataset("train")
    assert not torch.equal(images.augmented()[0][0], images.augmented()[0][0])
    assert torch.equal(images[0][0], images[0][0])


def test_digits_are_split_by_class():
    module = DigitsDataModule()
    sizes = [len(module.dataset(split)) for split in ("train", "val", "test")]
    assert sizes == [1197, 200, 400]
    assert module.dataset("test").labels.bincount().tolist() == pytest.approx([40] * 10, abs=2)
    images = images_of(module.train_dataloader())
    assert float(images.mean()) == pytest.approx(0, abs=0.05)
    assert float(images.std()) == pytest.approx(1, abs=0.05)


def test_cifar_pixels_and_labels_are_those_of_the_files(cifar10):
    raw = batch(30, 10, seed=6)
    images = CIFAR10DataModule(cifar10, mean=(0, 0, 0), std=(1, 1, 1)).dataset("test")
    expected = raw[b"data"].reshape(-1, 3, 32, 32)
    assert torch.equal(images.images, torch.tensor(expected))
    assert images.labels.tolist() == raw[b"labels"]
    torch.testing.assert_close(images[3][0], torch.tensor(expected[3]) / 255, atol=0, rtol=0)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_pickle_protocol_is_read(cifar10, protocol):
    values = batch(30, 10, seed=7)
    path = cifar10 / "cifar-10-batches-py/test_batch"
    path.write_bytes(pickle.dumps(values, protocol))
    read = CIFAR10DataModule(cifar10).dataset("test")
    assert torch.equal(read.images.flatten(1), torch.tensor(values[b"data"]))
    assert read.labels.tolist() == values[b"labels"]


class Evil:
    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        pytest.param((os.mkdir, "{}/owned"), id="os"),
        pytest.param((eval, "__import__('os').mkdir('{}/owned')"), id="eval"),
        pytest.param((np.save, "{}/owned", [1]), id="numpy"),
        pytest.param((getattr, np, "load"), id="getattr"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_is_refused_and_not_run(cifar10, call, protocol):
    path = cifar10 / "cifar-10-batches-py/test_batch"
    function, *args = call
    args = [a.format(cifar10) if isinstance(a, str) else 0 if a is np else a for a in args]
    path.write_bytes(pickle.dumps({**batch(4, 10, 0), b"x": Evil(function, *args)}, protocol))
    with pytest.raises(
        ValueError, match=r"test_batch' to hold arrays.*but found \S+\.\w+"
    ) as error:
        CIFAR10DataModule(cifar10).setup("test")
    assert "\n" not in str(error.value)
    assert not list(cifar10.glob("owned*"))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        pytest.param({b"data": np.zeros((2, 3072), object)}, "an array of type 'O8'", id="objects"),
        pytest.param({b"labels": [1, 2]}, "there is no 'data'", id="no images"),
        pytest.param({b"data": np.zeros((2, 7), np.uint8), b"labels": [1, 2]}, "shape", id="shape"),
        pytest.param(batch(3, 10, 0) | {b"labels": [1]}, "3 images and 1 labels", id="labels"),
        pytest.param(batch(1, 10, 0) | {b"labels": [10]}, "labels outside 0..9", id="classes"),
        pytest.param([1, 2], "list", id="no dict"),
    ],
)
def test_a_damaged_batch_is_named(cifar10, values, reason):
    (cifar10 / "cifar-10-batches-py/test_batch").write_bytes(pickle.dumps(values, 2))
    with pytest.raises(ValueError, match=rf"test_batch' to .*{reason}") as error:
        CIFAR10DataModule(cifar10).setup("test")
    assert "\n" not in str(error.value)


def test_a_truncated_batch_is_named(cifar10):
    path = cifar10 / "cifar-10-batches-py/data_batch_3"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="data_batch_3' to be as published, but it is damaged"):
        CIFAR10DataModule(cifar10).setup("fit")


def test_packed_idx_files_are_read_as_torchvision_reads_them(fashion_mnist):
    from torchvision.datasets import FashionMNIST

    expected = FashionMNIST(fashion_mnist, train=False)
    pack(fashion_mnist)
    read = FashionMNISTDataModule(fashion_mnist).dataset("test")
    assert torch.equal(read.images[:, 0], expected.data)
    assert torch.equal(read.labels, expected.targets)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("content", [b"", b"\x1f\x8bjunk", gzip.compress(b"\0\0\x08\x03", mtime=0)])
def test_a_damaged_idx_file_is_named(fashion_mnist, content, packed):
    if packed:
        pack(fashion_mnist)
    for path in (fashion_mnist / "FashionMNIST/raw").glob("t10k-images*"):
        path.write_bytes(content)
    with pytest.raises(ValueError, match="t10k-images-idx3-ubyte' to be as published"):
        FashionMNISTDataModule(root=fashion_mnist).setup("test")


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (CIFAR10DataModule, r"cifar10 in '.*cifar-10-batches-py', but .*'data_batch_1'"),
        (CIFAR100DataModule, r"cifar100 in '.*cifar-100-python', but there is no 'train'"),
        (FashionMNISTDataModule, r"fashion_mnist in '.*FashionMNIST/raw'.*'train-images-idx3"),
        (ImageFolderDataModule, r"a folder for each class in '.*val', but there is no such folder"),
    ],
)
def test_missing_data_says_what_where_and_how(tmp_path, cls, message):
    module = cls(root=str(tmp_path))
    module.prepare_data()
    with pytest.raises(FileNotFoundError, match=message) as error:
        module.setup("fit")
    assert "\n" not in str(error.value)
    assert cls is ImageFolderDataModule or "pass download=True to download it" in str(error.value)


@pytest.mark.parametrize("cls", [CIFAR10DataModule, FashionMNISTDataModule])
def test_downloads_only_when_asked_and_missing(request, tmp_path, monkeypatch, cls):
    asked = []
    monkeypatch.setattr(cls, "fetch", lambda self: asked.append(self.root))
    cls(root=str(tmp_path)).prepare_data()
    assert not asked
    module = cls(root=str(tmp_path), download=True)
    module.prepare_data()
    assert asked == [str(tmp_path)]
    with pytest.raises(FileNotFoundError, match=r"call prepare_data\(\)"):
        module.setup()


@pytest.mark.parametrize("cls", [CIFAR10DataModule, CIFAR100DataModule])
def test_the_archive_is_downloaded_but_not_unpickled(tmp_path, monkeypatch, cls):
    from torchvision.datasets import utils

    calls = []
    monkeypatch.setattr(
        utils, "download_and_extract_archive", lambda url, root, **kw: calls.append((url, kw))
    )
    cls(root=str(tmp_path), download=True).prepare_data()
    ((url, arguments),) = calls
    assert url.endswith(arguments["filename"])
    assert arguments["filename"] in cls.by_hand
    assert len(arguments["md5"]) == 32


def test_what_is_there_is_not_downloaded(cifar10, monkeypatch):
    monkeypatch.setattr(CIFAR10DataModule, "fetch", lambda self: pytest.fail("downloaded"))
    CIFAR10DataModule(root=cifar10, download=True).prepare_data()


def test_image_folder_classes_and_splits(image_folder):
    module = ImageFolderDataModule(image_folder, **FOLDER)
    assert module.classes == ["cat", "dog", "emu"]
    assert module.num_classes == 3
    assert module.name == "pets"
    assert [len(module.dataset(s)) for s in ("train", "val", "test")] == [30, 12, 6]
    assert [label for _, label in module.dataset("test").samples] == [0, 0, 1, 1, 2, 2]


def test_image_folder_without_test_uses_val(tmp_path):
    module = ImageFolderDataModule(make_folder(tmp_path, {"train": 2, "val": 3}), **FOLDER)
    assert module.dataset("test").samples == module.dataset("val").samples


def test_image_folder_evaluates_without_train(tmp_path):
    module = ImageFolderDataModule(make_folder(tmp_path, {"val": 3}), **FOLDER)
    module.setup("test")
    assert module.num_classes == 3
    with pytest.raises(FileNotFoundError, match="train', but there is no such folder"):
        module.calibration_dataloader()


def test_labels_of_a_val_folder_that_lacks_a_class_are_those_of_training(tmp_path):
    make_folder(tmp_path, {"train": 1, "val": 1})
    (tmp_path / "val/cat/0.png").unlink()
    (tmp_path / "val/cat").rmdir()
    images = ImageFolderDataModule(tmp_path, **FOLDER).dataset("val")
    assert [label for _, label in images.samples] == [1, 2]


def test_a_class_unknown_to_training_is_refused(tmp_path):
    make_folder(tmp_path, {"train": 1, "val": 1})
    (tmp_path / "val/fox").mkdir()
    with pytest.raises(ValueError, match="'fox' is not among them"):
        ImageFolderDataModule(tmp_path, **FOLDER).setup("validate")


def test_crop_and_squash_match_pillow(tmp_path):
    folder = tmp_path / "train/cat"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(folder / "a.png")
    settings = {**FOLDER, "image_size": 28, "mean": (0.0,) * 3, "std": (1.0,) * 3}
    squashed = ImageFolderDataModule(tmp_path, crop=False, **settings).dataset("train")[0][0]
    cropped = ImageFolderDataModule(tmp_path, crop=True, **settings).dataset("train")[0][0]
    whole = np.asarray(picture.resize((28, 28), Image.Resampling.BILINEAR))
    middle = np.asarray(picture.resize((42, 32), Image.Resampling.BILINEAR))[2:30, 7:35]
    for found, expected in (squashed, whole), (cropped, middle):
        expected = torch.tensor(expected.transpose(2, 0, 1)) / 255
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\0" * 40])
def test_a_corrupt_image_is_named(image_folder, content):
    (image_folder / "val/dog/1.png").write_bytes(content)
    module = ImageFolderDataModule(image_folder, **FOLDER)
    with pytest.raises(ValueError, match=r"dog/1.png' to be an image, but it cannot be") as error:
        images_of(module.val_dataloader())
    assert "\n" not in str(error.value)


def test_a_truncated_jpeg_is_named(image_folder):
    path = image_folder / "val/dog/9.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(ValueError, match=r"dog/9.jpg' to be an image.*truncated"):
        images_of(ImageFolderDataModule(image_folder, **FOLDER).val_dataloader())


def test_gray_and_transparent_images_become_rgb(image_folder):
    Image.new("L", (9, 9)).save(image_folder / "test/cat/0.png")
    Image.new("RGBA", (9, 9)).save(image_folder / "test/cat/1.png")
    module = ImageFolderDataModule(image_folder, **FOLDER)
    assert images_of(module.test_dataloader()).shape == (6, 3, 8, 8)


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "train/cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"Expected images in the class folders of .*found none"):
        ImageFolderDataModule(tmp_path).setup("fit")


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (DigitsDataModule, {"batch_size": 0}, "`batch_size` to be at least 1, but got 0"),
        (DigitsDataModule, {"calibration_size": 0}, "`calibration_size` to be at least 1"),
        (DigitsDataModule, {"num_workers": -1}, "`num_workers` to be at least 0"),
        (CIFAR10DataModule, {"val_size": 0}, "`val_size` to be at least 1"),
        (CIFAR10DataModule, {"std": (1.0,)}, "`mean` and `std` to have 3 values.*got"),
        (ImageFolderDataModule, {"image_size": 0}, "`image_size` to be at least 1"),
        (SyntheticDataModule, {"test_size": 0}, "`test_size` to be at least 1"),
        (SyntheticDataModule, {"num_classes": 0}, "`num_classes` to be at least 1"),
    ],
)
def test_bad_arguments(cls, arguments, message):
    with pytest.raises(ValueError, match=f"Expected {message}"):
        cls(**arguments)


def test_an_empty_data_set_is_refused(cifar10):
    path = cifar10 / "cifar-10-batches-py/test_batch"
    path.write_bytes(published(batch(0, 10, 0)))
    with pytest.raises(ValueError, match="test images of cifar10 to be at least one"):
        CIFAR10DataModule(cifar10).setup("test")


def test_val_and_calibration_are_clipped_and_say_so(cifar10, caplog):
    module = CIFAR10DataModule(cifar10)
    assert [len(module.dataset(split)) for split in ("train", "val", "test")] == [80, 20, 30]
    assert len(module.calibration_dataloader().dataset) == 80
    assert "Of cifar10 only 20 images validate" in caplog.text
    assert "Calibration sees all 80 training images of cifar10" in caplog.text


def test_synthetic_data_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        module = SyntheticDataModule(num_classes=3, input_shape=(1, 8, 8), train_size=30)
        module.setup("fit")
    assert module.name == "synthetic"
    assert "synthetic" in caplog.text
    assert module.num_classes == 3


def test_synthetic_classes_can_be_told_apart():
    module = SyntheticDataModule(train_size=200, test_size=100)
    train, test = module.dataset("train"), module.dataset("test")
    means = torch.stack([train.images[train.labels == c].float().mean(0) for c in range(10)])
    nearest = torch.cdist(test.images.float().flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == test.labels).float().mean() > 0.95


def test_random_crop_flip_gives_crops_of_the_padded_image():
    images = torch.arange(1, 2 * 3 * 25 + 1, dtype=torch.uint8).view(2, 3, 5, 5)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)))
    seen = set()
    for _ in range(100):
        for image, source in zip(random_crop_flip(images, 1).numpy(), padded, strict=True):
            crops = {
                (top, left, flip): source[:, top : top + 5, left : left + 5][:, :, :: 1 - 2 * flip]
                for top in range(3)
                for left in range(3)
                for flip in (0, 1)
            }
            seen.update(key for key, crop in crops.items() if np.array_equal(crop, image))
    assert len(seen) == 18


def test_one_image_equals_its_row_of_a_batch():
    data = LabelledImages(torch.randint(0, 256, (5, 3, 4, 4), dtype=torch.uint8), torch.arange(5))
    images = TensorImages(data, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 4.0])
    for (image, label), index in zip(images.__getitems__([4, 1]), [4, 1], strict=True):
        assert torch.equal(image, images[index][0])
        assert label == images[index][1] == index


def test_workers_persist():
    loader = DigitsDataModule(num_workers=1, batch_size=400).test_dataloader()
    assert loader.persistent_workers
    assert images_of(loader).shape[0] == 400


CLASSES = [
    DigitsDataModule,
    CIFAR10DataModule,
    CIFAR100DataModule,
    FashionMNISTDataModule,
    ImageFolderDataModule,
    SyntheticDataModule,
]


@pytest.mark.parametrize("cls", CLASSES)
def test_hyperparameters_are_plain_and_rebuild_the_module(cls, tmp_path):
    root = {"root": tmp_path} if "root" in inspect.signature(cls).parameters else {}
    module = cls(**root, seed=3)
    torch.save(dict(module.hparams), tmp_path / "hparams.pt")
    stored = torch.load(tmp_path / "hparams.pt", weights_only=True)
    assert stored["seed"] == 3
    assert dict(cls(**stored).hparams) == stored
    own = [
        p.name for p in inspect.signature(cls).parameters.values() if p.kind is not p.VAR_KEYWORD
    ]
    assert {"batch_size", "num_workers", "calibration_size", *own} <= stored.keys()


@pytest.mark.parametrize("cls", CLASSES)
def test_yaml_builds_the_module(cls):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    parsed = parser.parse_object(
        {"data": {"class_path": f"lq.data.{cls.__name__}", "init_args": {"batch_size": 5}}}
    )
    # older jsonargparse has the other name only
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    module = instantiate(parsed).data
    assert type(module) is cls
    assert module.batch_size == 5
    with pytest.raises(jsonargparse.ArgumentError, match="bath_size"):
        parser.parse_object(
            {"data": {"class_path": f"lq.data.{cls.__name__}", "init_args": {"bath_size": 5}}}
        )


def test_every_argument_is_explained_in_help():
    for cls in CLASSES:
        parser = jsonargparse.ArgumentParser()
        parser.add_class_arguments(cls, "data")
        text = parser.format_help()
        assert "Images in a batch." in text
        explained = {a.dest: a.help for a in parser._actions if a.dest.startswith("data.")}
        assert all(explained.values()), explained


def test_there_are_no_other_data_modules():
    found = [
        c
        for c in vars(lq_data).values()
        if inspect.isclass(c) and issubclass(c, ImageDataModule) and c.name is not None
    ]
    assert {c.__name__ for c in found} <= {c.__name__ for c in CLASSES}


def test_a_trainer_runs_and_the_checkpoint_keeps_the_arguments(tmp_path):
    from lightning.pytorch.demos.boring_classes import BoringModel

    class Model(BoringModel):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 2)

        def step(self, batch):
            return self.layer(batch[0].flatten(1)).square().mean()

        def training_step(self, batch, _):
            return self.step(batch)

        def validation_step(self, batch, _):
            return {"x": self.step(batch)}

        def test_step(self, batch):
            return {"y": self.step(batch)}

        def predict_step(self, batch, _):
            return self.step(batch)

    trainer = L.Trainer(
        max_steps=2,
        limit_val_batches=1,
        limit_test_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model, module = Model(), DigitsDataModule(batch_size=8)
    trainer.fit(model, datamodule=module)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    trainer.test(model, datamodule=module, verbose=False)
    trainer.predict(model, datamodule=module)
    restored = DigitsDataModule.load_from_checkpoint(tmp_path / "a.ckpt", weights_only=True)
    assert restored.batch_size == 8
