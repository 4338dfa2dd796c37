"""How far the outputs of a model and of an engine agree, end to end."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MIN_SQNR_DB = 15.0
"""The graph run as it is: one flipped code spreads, so the bound is loose."""
MIN_ENGINE_SQNR_DB = 10.0
"""An engine's own kernels, which round a sum before or after its bias and flip more codes."""
CONFIDENT_MARGIN = 0.1
"""A sample is confident if its two largest outputs differ by this share of its output range."""


@dataclass(frozen=True)
class Agreement:
    """How far an engine's outputs agree with the model's.

    Attributes:
        engine: What ran the file.
        n: Samples compared.
        top1_agreement: Share of samples with the same largest value in the first output.
        confident_agreement: The same over confident samples.
        max_difference: Largest absolute difference of outputs.
        mean_difference: Mean absolute difference of outputs.
        sqnr_db: Outputs of the file against those of the model.
        min_sqnr_db: What it must reach.
    """

    engine: str
    n: int
    top1_agreement: float
    confident_agreement: float
    max_difference: float
    mean_difference: float
    sqnr_db: float
    min_sqnr_db: float

    @property
    def passed(self) -> bool:
        """Whether model and engine agree on all confident samples and within the SQNR."""
        return self.confident_agreement == 1.0 and self.sqnr_db >= self.min_sqnr_db

    def summary(self) -> str:
        """Return the figures in a line."""
        return (
            f"{self.n} samples, top-1 agreement {self.top1_agreement:.2%} "
            f"(confident samples {self.confident_agreement:.2%}), output difference max "
            f"{self.max_difference:.2g} mean {self.mean_difference:.2g}, SQNR {self.sqnr_db:.1f} dB"
        )


class OutputComparison:
    """Adds up how the outputs of two sides differ, in constant memory.

    Args:
        engine: What gives the second side.
        min_sqnr_db: What its SQNR must reach.

    Example:
        >>> comparison = OutputComparison("engine")
        >>> comparison.add([torch.eye(2)], [torch.eye(2) * 0.9])
        >>> comparison.result().top1_agreement, round(comparison.result().sqnr_db, 1)
        (1.0, 20.0)
    """

    def __init__(self, engine: str, min_sqnr_db: float = MIN_SQNR_DB) -> None:
        self.engine, self.min_sqnr_db = engine, min_sqnr_db
        self.agree = self.confident = self.confident_agree = self.n = self.elements = 0
        self.max_difference = self.sum_difference = self.signal = self.noise = 0.0

    def add(self, expected: list[Tensor], got: list[Tensor]) -> None:
        """Take note of one batch.

        Raises:
            RuntimeError: If the sides have outputs of other number or shapes.
        """
        shapes = [[list(y.shape) for y in side] for side in (expected, got)]
        if shapes[0] != shapes[1]:
            raise RuntimeError(
                f"Expected {self.engine} to give outputs of shapes {shapes[0]}, as the model does, "
                f"but got {shapes[1]}."
            )
        for ours, theirs in zip(expected, got, strict=True):
            self._add_output(ours.cpu().double(), theirs.cpu().double())
        first, other = (_rows(side[0].cpu()) for side in (expected, got))
        same, confident = first.argmax(1) == other.argmax(1), is_confident(first)
        self.n += len(first)
        self.agree += int(same.sum())
        self.confident += int(confident.sum())
        self.confident_agree += int((same & confident).sum())

    def _add_output(self, ours: Tensor, theirs: Tensor) -> None:
        difference = (ours - theirs).abs()
        self.elements += ours.numel()
        self.max_difference = max(self.max_difference, float(difference.max()))
        self.sum_difference += float(difference.sum())
        self.signal += float(ours.square().sum())
        self.noise += float(difference.square().sum())

    def result(self) -> Agreement:
        """Return the figures over all batches.

        Raises:
            ValueError: If there were none.
        """
        if not self.n:
            raise ValueError("Expected `batches` to hold at least one sample, but got none.")
        return Agreement(
            engine=self.engine,
            n=self.n,
            top1_agreement=self.agree / self.n,
            confident_agreement=self.confident_agree / self.confident if self.confident else 1.0,
            max_difference=self.max_difference,
            mean_difference=self.sum_difference / self.elements,
            sqnr_db=10 * math.log10(self.signal / self.noise) if self.noise else math.inf,
            min_sqnr_db=self.min_sqnr_db,
        )


def _rows(output: Tensor) -> Tensor:
    """Return an output as one row a sample."""
    return output.reshape(len(output) if output.dim() else 1, -1)


def is_confident(outputs: Tensor) -> Tensor:
    """Return which rows ``[N, classes]`` have a largest value well above the second.

    Example:
        >>> is_confident(torch.tensor([[3.0, 1.0, 0.0], [3.0, 2.9, 0.0]]))
        tensor([ True, False])
    """
    if outputs.shape[1] < 2:
        return torch.ones(len(outputs), dtype=torch.bool)
    best, second = outputs.topk(2, dim=1).values.unbind(1)
    spread = outputs.amax(1) - outputs.amin(1)
    return best - second > CONFIDENT_MARGIN * spread
