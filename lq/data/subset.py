"""Choose the images that calibration sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset, Subset

from lq.data.checks import refuse_augmentation, refuse_overlap
from lq.data.features import Features, pooled_features, pooled_pixels
from lq.data.reading import labels_of, random_state_kept, read
from lq.data.report import CalibrationReport, summarize
from lq.data.strategies import farthest_points, seeded_order, stratified
from lq.messages import suggest

STRATEGIES = ("random", "stratified", "coverage")


class CalibrationSubset(Subset[Any]):
    """The images that ``calibration_subset`` chose.

    Attributes:
        dataset: What they were chosen from.
        indices: Which they are, in an order whose beginnings are good choices too.
        strategy: How they were chosen.
        seed: What fixed the choice.
    """

    def __init__(self, dataset: Dataset[Any], indices: list[int], strategy: str, seed: int) -> None:
        super().__init__(dataset, indices)
        self.strategy, self.seed = strategy, seed

    @random_state_kept()
    def report(self) -> CalibrationReport:
        """Read the images and return their class counts and channel statistics."""
        of = len(self.dataset)  # type: ignore[arg-type]
        return summarize(read(self.dataset, self.indices), of, self.strategy, self.seed)


@random_state_kept()
def calibration_subset(
    dataset: Dataset[Any],
    size: int,
    strategy: str = "random",
    seed: int = 0,
    *,
    exclude: Dataset[Any] | Sequence[Dataset[Any]] = (),
    features: Features | None = None,
    candidates: int = 4096,
    num_workers: int = 0,
    progress: bool = True,
) -> CalibrationSubset:
    """Choose images for calibration: the same ones for the same seed, whatever else is random.

    - ``"random"``: any.
    - ``"stratified"``: each class in its share of the dataset, from labels alone where the
      dataset lists them.
    - ``"coverage"``: as different from each other as can be: farthest-point sampling on pooled
      features, among `candidates` random images, so that a large dataset is not read whole.

    Global random state is left as it is, and no more than a batch of images is held in memory.

    Args:
        dataset: Training images with the transform of validation: tensors, or (tensor, label).
        size: How many.
        strategy: ``"random"``, ``"stratified"`` or ``"coverage"``.
        seed: Fixes the choice.
        exclude: Datasets of validation and test, with the same transform. They are read whole.
        features: For coverage: makes features ``[N, D]`` or feature maps ``[N, D, H, W]`` of
            images ``[N, C, H, W]``, such as a model without its last layer; the mean of each
            channel in each field of a 4x4 grid if not given.
        candidates: How many random images coverage looks at; never fewer than `size`.
        num_workers: Processes that read images.
        progress: Show a progress bar where many images are read.

    Raises:
        ValueError: If an argument is out of range, images are augmented, or some of them are in
            `exclude`, saying how many and which.

    Example:
        >>> from lq.data import DigitsDataModule
        >>> module = DigitsDataModule()
        >>> held_out = (module.dataset("val"), module.dataset("test"))
        >>> images = calibration_subset(
        ...     module.dataset("train"), 100, "stratified", exclude=held_out, progress=False
        ... )
        >>> print(images.report())
        100 of 1197 images, stratified, seed 0
        10 classes, 10 images each
        channel    mean     std      min      max
              0   0.014   1.007   -0.812    1.848
    """
    _check(dataset, size, strategy, features)
    count = len(dataset)  # type: ignore[arg-type]
    chosen = seeded_order(count, seed)
    if strategy == "stratified":
        chosen = stratified(labels_of(dataset, count, num_workers, progress), size, seed)
    elif strategy == "coverage":
        pool = chosen[: max(candidates, size)]
        description = "Reading candidates" if progress else None
        batches = read(dataset, pool.tolist(), num_workers, description)
        chosen = pool[farthest_points(pooled_features(batches, features or pooled_pixels), size)]
    indices: list[int] = chosen[:size].tolist()
    refuse_augmentation(dataset, indices)
    excluded = (exclude,) if isinstance(exclude, Dataset) else tuple(exclude)
    refuse_overlap(dataset, indices, excluded, num_workers, progress)
    return CalibrationSubset(dataset, indices, strategy, seed)


def check_strategy(strategy: str) -> None:
    """Raise a ``ValueError`` for an unknown strategy."""
    if strategy not in STRATEGIES:
        raise ValueError(
            f"Expected `strategy` to be one of {', '.join(STRATEGIES)}, but got {strategy!r}; "
            f"{suggest(strategy, STRATEGIES)}"
        )


def _check(dataset: Any, size: int, strategy: str, features: Features | None) -> None:
    check_strategy(strategy)
    if features is not None and strategy != "coverage":
        raise ValueError(
            f"Expected `features` with the strategy 'coverage' only, but got {strategy!r}; "
            "leave them out."
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            "Expected a dataset with a length, whose samples have numbers, but got "
            f"{type(dataset).__name__}; keep some of its samples in a list."
        )
    if not 1 <= size <= len(dataset):
        raise ValueError(
            f"Expected `size` to be between 1 and the {len(dataset)} images there are, but got "
            f"{size}."
        )
