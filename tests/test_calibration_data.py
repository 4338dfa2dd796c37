"""Choosing calibration images, against numpy, scikit-learn and brute force."""

import hashlib
import random
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import yaml
from sklearn.model_selection import StratifiedShuffleSplit
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

import lq
from lq.data import DigitsDataModule, ImageFolderDataModule, SyntheticDataModule, calibration_subset
from lq.data.checks import image_digest
from lq.data.features import pooled_pixels
from lq.data.strategies import farthest_points, seeded_order, shares, stratified
from lq.datasets import TensorImages, read_rgb
from tests.test_data import FOLDER, image_folder  # noqa: F401

STRATEGIES = ["random", "stratified", "coverage"]
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)
DIGITS = DigitsDataModule(calibration_size=50)


class Listed(Dataset):
    """A map-style dataset of any samples, which counts how often one is read."""

    def __init__(self, samples, **attributes):
        self.samples, self.reads = samples, 0
        vars(self).update(attributes)

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.reads += 1
        sample = self.samples[index]
        return sample() if callable(sample) else sample


def noise(count: int, seed: int = 0, classes: int = 3) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    return TensorDataset(torch.randn(count, 2, 8, 8, generator=generator), labels)


def choose(dataset, size, strategy="random", **more):
    return calibration_subset(dataset, size, strategy, progress=False, **more)


@each_strategy
def test_the_seed_alone_fixes_the_choice(strategy):
    train = DIGITS.dataset("train")
    torch.manual_seed(0)
    first = choose(train, 40, strategy).indices
    torch.manual_seed(1)
    assert choose(train, 40, strategy).indices == first
    assert choose(train, 40, strategy, seed=1).indices != first
    assert len(set(first)) == 40
    assert all(0 <= index < len(train) for index in first)


@each_strategy
def test_global_random_state_is_left_alone(strategy):
    def draws():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)

    def greedy():  # an image that draws from every generator without depending on them
        draws()
        return torch.ones(1, 4, 4), 0

    seed()
    expected = draws()
    seed()
    choose(Listed([greedy] * 10), 4, strategy).report()
    assert draws() == expected


def test_random_is_the_seeded_order():
    generator = torch.Generator().manual_seed(3)
    expected = torch.randperm(1197, generator=generator)[:50].tolist()
    assert choose(DIGITS.dataset("train"), 50, seed=3).indices == expected


@pytest.mark.parametrize("size", [3, 10, 17, 100, 999])
def test_stratified_counts_are_those_of_sklearn(size):
    labels = np.repeat(np.arange(3), [700, 250, 50])
    found = Counter(labels[stratified(torch.tensor(labels), size, seed=0)].tolist())
    split = StratifiedShuffleSplit(1, train_size=size, test_size=None, random_state=0)
    if size == 999:  # it insists on a rest with every class in it
        expected = {0: 699, 1: 250, 2: 50}
    else:
        chosen, _ = next(split.split(labels, labels))
        expected = Counter(labels[chosen].tolist())
    assert all(abs(found[c] - expected[c]) <= 1 for c in range(3))
    for c, exact in enumerate(size * np.array([0.7, 0.25, 0.05])):
        assert np.floor(exact) <= found[c] <= np.ceil(exact)
    assert found.total() == size


def test_shares_are_the_largest_remainders_exactly():
    rng = np.random.default_rng(0)
    for _ in range(50):
        sizes = rng.integers(1, 10**6, 7)
        size = int(rng.integers(1, sizes.sum() + 1))
        exact = [int(n) * size for n in sizes]  # Python's integers do not overflow
        total = int(sizes.sum())
        expected = [e // total for e in exact]
        for c in sorted(range(7), key=lambda c: -(exact[c] % total))[: size - sum(expected)]:
            expected[c] += 1
        assert shares(torch.tensor(sizes), size, seed=0).tolist() == expected


def test_ties_do_not_favour_the_first_classes():
    labels = torch.arange(100).repeat(4)
    for seed in range(3):
        classes = labels[stratified(labels, 20, seed)]
        assert len(set(classes.tolist())) == 20
        assert 20 < classes.float().mean() < 79


def test_every_beginning_of_a_stratified_choice_is_stratified():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)[torch.randperm(100)]
    chosen = labels[stratified(labels, 50, seed=0)]
    for size in range(1, 51):
        counts = chosen[:size].bincount(minlength=3)
        assert (counts - size * torch.tensor([0.6, 0.3, 0.1])).abs().max() <= 1


def brute_force(points: np.ndarray, size: int) -> list[int]:
    chosen = [0]
    while len(chosen) < size:
        rest = [i for i in range(len(points)) if i not in chosen]
        nearest = [min(((points[i] - points[j]) ** 2).sum() for j in chosen) for i in rest]
        chosen.append(rest[int(np.argmax(nearest))])
    return chosen


@pytest.mark.parametrize("span", [2, 1000], ids=["many ties", "few ties"])
def test_farthest_points_are_those_of_brute_force(span):
    points = np.random.default_rng(0).integers(0, span, (40, 3))  # so that sums are exact
    for size in (1, 2, 13, 40):
        found = farthest_points(torch.tensor(points, dtype=torch.float32), size)
        assert found.tolist() == brute_force(points, size)


def test_coverage_takes_the_farthest_of_the_candidates():
    data = noise(60)
    pool = seeded_order(60, seed=2)[:30]
    images = data.tensors[0][pool].numpy()
    pooled = images.reshape(30, 2, 4, 2, 4, 2).mean((3, 5)).reshape(30, -1)
    np.testing.assert_allclose(pooled_pixels(data.tensors[0][pool]), pooled, atol=1e-6)
    expected = pool[brute_force(pooled.astype(np.float64), 10)].tolist()
    assert choose(data, 10, "coverage", seed=2, candidates=30).indices == expected
    everything = choose(data, 60, "coverage", candidates=30).indices
    assert sorted(everything) == list(range(60))


def test_coverage_reads_the_candidates_only():
    data = Listed([(image, 0) for image in noise(500).tensors[0]])
    choose(data, 5, "coverage", candidates=20)
    assert data.reads == 20 + 2 * 32  # and looks twice at some for augmentation


def test_coverage_finds_what_random_misses():
    images = torch.randn(1000, 1, 8, 8, generator=torch.Generator().manual_seed(0)) / 100
    images[123] += 1
    images[877] -= 1
    data = TensorDataset(images)
    assert {123, 877} <= set(choose(data, 8, "coverage").indices)
    assert not {123, 877} & set(choose(data, 8, "random").indices)


def test_coverage_of_a_models_features():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout()).train()
    data = noise(40)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = choose(data, 8, "coverage", features=model).indices
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    order = seeded_order(40, seed=0)
    with torch.no_grad():
        rows = model.eval()(data.tensors[0][order]).mean((2, 3)).numpy().astype(np.float64)
    assert found == order[brute_force(rows, 8)].tolist()
    quantized = lq.quantize(model, "tensorrt_int8")  # not calibrated: runs in float
    assert choose(data, 8, "coverage", features=quantized).indices == found


def test_labels_are_known_without_reading_images():
    labels = [0] * 30 + [1] * 10
    images = [(torch.full((1, 4, 4), float(i)), y) for i, y in enumerate(labels)]
    listed = Listed(images, targets=labels)
    for data in (listed, Subset(listed, range(40)), ConcatDataset([listed])):
        listed.reads = 0
        chosen = choose(data, 8, "stratified")
        assert listed.reads == 2 * 32  # to look for augmentation
        assert Counter(labels[i] for i in chosen.indices) == {0: 6, 1: 2}
    unknown = Listed(images)
    assert choose(unknown, 8, "stratified").indices == chosen.indices
    assert unknown.reads == 40 + 2 * 32
    part = Subset(listed, range(20, 40))
    assert Counter(labels[20 + i] for i in choose(part, 10, "stratified").indices) == {0: 5, 1: 5}


def test_a_torchvision_dataset(tmp_path):
    from torchvision.datasets import FakeData
    from torchvision.transforms import v2

    plain = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True)]
    data = FakeData(30, (3, 8, 8), 3, v2.Compose(plain))
    for strategy in STRATEGIES:
        assert len(choose(data, 10, strategy)) == 10
    data.transform = v2.Compose([v2.RandomHorizontalFlip(), *plain])
    with pytest.raises(
        ValueError, match=r"not augmented, but image \d+ of the dataset changes each"
    ):
        choose(data, 1)
    data.transform = None
    with pytest.raises(ValueError, match="begin with an image tensor, but got Image; give the"):
        choose(data, 10)


def test_augmented_images_of_ours_are_refused():
    torch.manual_seed(0)
    augmented = DIGITS.dataset("train").augmented()
    with pytest.raises(ValueError, match=r"the one that `augmented\(\)` was called on"):
        choose(augmented, 20)
    with pytest.raises(ValueError, match=r"image 0 of exclude\[1\] changes each time"):
        choose(DIGITS.dataset("train"), 20, exclude=(DIGITS.dataset("val"), augmented))


def test_overlap_is_refused_with_count_and_indices():
    train, val = noise(50), noise(20, seed=1)
    images = val.tensors[0].clone()
    chosen = choose(train, 12, exclude=(val,)).indices  # disjoint
    stolen = chosen[2:9]
    images[:7] = train.tensors[0][stolen]
    leaking = TensorDataset(images, val.tensors[1])
    first = ", ".join(map(str, stolen[:5]))
    message = rf"but 7 of 12 are in exclude\[1\] too: images {first}, \.\.\.; leave them out"
    with pytest.raises(ValueError, match=message):
        choose(train, 12, exclude=(val, leaking))
    with pytest.raises(ValueError, match=r"12 of 12 are in exclude\[0\]"):
        choose(train, 12, exclude=train)
    others = [i for i in range(50) if i not in stolen]
    assert len(choose(Subset(train, others), 12, exclude=leaking)) == 12


def test_digests_are_equal_where_bytes_are():
    image = torch.randn(3, 4, 5)
    content = b"torch.float32[3, 4, 5]" + image.numpy().tobytes()
    assert image_digest(image) == hashlib.blake2b(content, digest_size=16).digest()
    assert image_digest(image.transpose(0, 1).contiguous().transpose(0, 1)) == image_digest(image)
    others = [image.view(3, 5, 4), image.double(), image.to(torch.bfloat16), image + 1e-3]
    assert len({image_digest(x) for x in [image, *others]}) == 5


def test_splits_of_the_digits_do_not_overlap():
    held_out = (DIGITS.dataset("val"), DIGITS.dataset("test"))
    train = DIGITS.dataset("train")
    assert len(choose(train, len(train), exclude=held_out)) == 1197


@pytest.mark.parametrize("workers", [0, 1])
def test_report_is_that_of_numpy(workers):
    data = noise(100)
    subset = choose(data, 70, "stratified", seed=4, num_workers=workers)
    report = subset.report()
    images = data.tensors[0][subset.indices].numpy().astype(np.float64)
    axes = (0, 2, 3)
    np.testing.assert_allclose(report.mean, images.mean(axes), rtol=1e-12)
    np.testing.assert_allclose(report.std, images.std(axes), rtol=1e-12)
    assert report.low == tuple(images.min(axes))
    assert report.high == tuple(images.max(axes))
    assert report.class_counts == Counter(data.tensors[1][subset.indices].tolist())
    assert str(report).splitlines()[0] == "70 of 100 images, stratified, seed 4"
    assert len(str(report).splitlines()) == 5


def test_report_of_unlabelled_images_has_no_classes():
    report = choose(TensorDataset(torch.zeros(5, 1, 4, 4)), 3).report()
    assert report.class_counts == {}
    assert "classes" not in str(report)


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.zeros(1, 4, 4)


def unlabelled() -> TensorDataset:
    return TensorDataset(torch.zeros(5, 1, 4, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "stratify"}, "`strategy` to be one of .*; did you mean 'stratified'"),
        ({"size": 0}, "`size` to be between 1 and the 5 images there are, but got 0"),
        ({"size": 6}, "between 1 and the 5 images there are, but got 6"),
        ({"strategy": "stratified"}, "sample 0 has none; choose the strategy 'random'"),
        ({"features": pooled_pixels}, "`features` with the strategy 'coverage' only"),
        ({"dataset": Stream()}, "a dataset with a length.*but got Stream"),
        ({"dataset": Listed([(None, 1)])}, "begin with an image tensor, but got NoneType"),
        ({"dataset": Listed([()])}, "begin with an image tensor, but got NoneType"),
        (
            {"strategy": "coverage", "features": lambda x: x.sum()},
            r"a row for each of 5 images, but got \[\]",
        ),
        ({"strategy": "coverage", "features": lambda x: x / 0}, "finite, but got NaN"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=f"Expected .*{message}") as error:
        calibration_subset(**{"dataset": unlabelled(), "size": 1, "progress": False, **arguments})
    assert "\n" not in str(error.value)


def labels_of(loader) -> torch.Tensor:
    return torch.cat([labels for _, labels in loader])


def test_data_modules_take_a_strategy():
    subsets = {}
    for strategy in STRATEGIES:
        module = DigitsDataModule(calibration_size=50, calibration_strategy=strategy)
        subset = subsets[strategy] = module.calibration_dataloader().dataset
        assert len(subset) == 50
        assert subset.report().strategy == strategy
        assert module.calibration_dataloader().dataset is subset  # chosen once
        assert module.hparams.calibration_strategy == strategy
        if strategy == "stratified":
            counts = labels_of(module.calibration_dataloader()).bincount()
            assert counts.tolist() == pytest.approx([5] * 10, abs=1)
    assert len({tuple(subset.indices) for subset in subsets.values()}) == 3
    expected = torch.randperm(1197, generator=torch.Generator().manual_seed(0))[:50]
    assert subsets["random"].indices == expected.tolist()
    with pytest.raises(ValueError, match="did you mean 'coverage'"):
        DigitsDataModule(calibration_strategy="cover")


def test_data_modules_of_folders_know_labels_without_decoding(image_folder, monkeypatch):  # noqa: F811
    decoded = []
    monkeypatch.setattr("lq.datasets.read_rgb", lambda path: decoded.append(path) or read_rgb(path))
    settings = {**FOLDER, "calibration_size": 6, "calibration_strategy": "stratified"}
    subset = ImageFolderDataModule(image_folder, **settings).calibration_dataset()
    assert len(set(decoded)) == 6
    assert subset.report().class_counts == {0: 2, 1: 2, 2: 2}


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_folder_with_copies_of_calibration_images_is_refused(image_folder, split):  # noqa: F811
    module = ImageFolderDataModule(image_folder, **FOLDER)
    images = module.dataset("train")
    chosen = module.calibration_dataset().indices
    path = images.samples[chosen[4]][0]
    shutil.copy(path, image_folder / split / "dog/copy.png")
    again = ImageFolderDataModule(image_folder, **FOLDER)
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=rf"{split}', but 1 of 20 are, the first as '{path}'"):
            again.calibration_dataloader()


def test_strategy_in_yaml_reaches_the_module():
    import jsonargparse
    import lightning as L

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    text = """
    data:
      class_path: lq.data.SyntheticDataModule
      init_args: {calibration_strategy: coverage, calibration_size: 7}
    """
    parsed = parser.parse_object(yaml.safe_load(text))
    instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes
    module = instantiate(parsed).data
    assert type(module) is SyntheticDataModule
    assert module.calibration_dataset().strategy == "coverage"
    assert isinstance(module.calibration_dataset().dataset, TensorImages)
