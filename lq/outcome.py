"""What a model said of samples whose class is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from lq.paired import Drop, paired_drop

_ALONE: dict[str, Any] = {"sync_on_compute": False}
"""What one process measures is its own: others may not be measuring."""
BINS = 15
"""Bins of confidence that the calibration error is a mean over."""


@dataclass(frozen=True)
class Outcome:
    """What a model said of samples whose class is known.

    Attributes:
        predicted: Class of each sample's largest output, ``[N]``.
        target: Class of each sample, ``[N]``.
        top1: Share of samples predicted right, 0..1.
        top5: Share of samples whose target is among the five largest outputs, or among all where
            there are fewer classes.
        loss: Mean cross-entropy, in nats.
        calibration_error: Mean distance between confidence and share of right ones, over 15 bins
            of confidence, weighted by their samples (Guo et al. 2017, equation 3).
        places: Of a dense output, how many of the above each sample has; ``None`` where it is one.
    """

    predicted: Tensor
    target: Tensor
    top1: float
    top5: float
    loss: float
    calibration_error: float
    places: Tensor | None = None

    @property
    def right(self) -> Tensor:
        """Whether each sample is predicted right, ``[N]``."""
        return self.predicted == self.target

    def agreement(self, reference: Outcome) -> float:
        """Return the share of samples for which another model predicts the same class."""
        self._check(reference)
        return float((self.predicted == reference.predicted).double().mean())

    def drop(self, reference: Outcome) -> Drop:
        """Return how much less often this model is right than another, with its interval."""
        self._check(reference)
        return paired_drop(reference.right, self.right, self.places)

    def class_drops(self, reference: Outcome) -> dict[int, float]:
        """Return class -> by how much less often its samples are predicted right, 0..1."""
        self._check(reference)
        count = torch.bincount(self.target)
        lost = reference.right.double() - self.right.double()
        drops = torch.bincount(self.target, lost) / count
        return {int(c): float(drops[c]) for c in count.nonzero()[:, 0]}

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; ``from_dict`` gives it back."""
        return {k: v.tolist() if isinstance(v, Tensor) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Outcome:
        """Return the outcome that ``to_dict`` wrote, also by way of JSON."""
        names = [n for n in ("predicted", "target", "places") if values.get(n) is not None]
        return cls(**{**values, **{name: torch.tensor(values[name]) for name in names}})

    def _check(self, reference: Outcome) -> None:
        if not torch.equal(self.target, reference.target):
            raise ValueError(
                "Expected both models to have seen the same samples in the same order, but their "
                f"targets differ ({len(reference.target)} and {len(self.target)} samples); give a "
                "loader that does not shuffle."
            )


class OutcomeMeter:
    """Adds up batches to an ``Outcome``.

    Example:
        >>> meter = OutcomeMeter()
        >>> meter.add(torch.eye(3) * 4, torch.tensor([0, 1, 1]))
        >>> outcome = meter.result()
        >>> round(outcome.top1, 3), outcome.top5, outcome.predicted.tolist()
        (0.667, 1.0, [0, 1, 2])
    """

    def __init__(self) -> None:
        self.predicted: list[Tensor] = []
        self.targets: list[Tensor] = []
        self.places: list[Tensor] = []
        self.loss = 0.0
        self._metrics: tuple[MetricCollection, MulticlassCalibrationError] | None = None

    def add(self, logits: Tensor, target: Tensor) -> None:
        """Take note of a batch of outputs ``[N, classes, ...]`` and class numbers ``[N, ...]``.

        Places of a dense output, such as a segmentation's pixels, count one by one.

        Raises:
            ValueError: If an output is not finite, or has no place for a target's class.
        """
        if int(target.max()) >= logits.shape[1]:
            raise ValueError(
                f"Expected outputs for class {int(target.max())}, but got {logits.shape[1]} "
                "classes; give a model of the same classes."
            )
        if not bool(logits.isfinite().all()):
            seen = sum(len(part) for part in self.targets)
            raise ValueError(
                f"Expected finite outputs, but the batch after {seen} samples gives NaN or "
                "infinity; look at its inputs."
            )
        self.places.append(torch.full((len(target),), target.numel() // max(len(target), 1)))
        logits, target = logits.movedim(1, -1).flatten(0, -2), target.flatten()
        if self._metrics is None:
            self._metrics = _metrics(logits.shape[1])
        accuracies, calibration = self._metrics
        accuracies.update(logits, target)
        calibration.update(logits.softmax(1), target)  # takes what is in 0..1 as it is
        self.loss += float(F.cross_entropy(logits.double(), target.long(), reduction="sum"))
        self.predicted.append(logits.argmax(1))
        self.targets.append(target.long())

    def result(self) -> Outcome:
        """Return what was added up.

        Raises:
            ValueError: If that was nothing.
        """
        if self._metrics is None:
            raise ValueError("Expected `batches` to hold at least one batch, but got none.")
        accuracies, calibration = self._metrics
        found = {name: float(value) for name, value in accuracies.compute().items()}
        target, places = torch.cat(self.targets), torch.cat(self.places)
        return Outcome(
            predicted=torch.cat(self.predicted),
            target=target,
            top1=found["top1"],
            top5=found["top5"],
            loss=self.loss / len(target),
            calibration_error=float(calibration.compute()),
            places=None if bool((places == 1).all()) else places,
        )


def _metrics(classes: int) -> tuple[MetricCollection, MulticlassCalibrationError]:
    accuracies = MetricCollection(
        {
            "top1": MulticlassAccuracy(classes, average="micro", **_ALONE),
            "top5": MulticlassAccuracy(classes, min(5, classes), average="micro", **_ALONE),
        }
    )
    return accuracies, MulticlassCalibrationError(classes, BINS, **_ALONE)
