"""Calibration with more and more samples: what it gives, and how many are enough."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MORE = 4
"""A size is judged against sizes up to this many times as large, at least."""
RANGE, AGREEMENT, SQNR_DB = 0.05, 0.005, 0.5
"""By how much ranges (relative, median), agreement and SQNR may still move."""


@dataclass(frozen=True)
class CurvePoint:
    """What calibration with some samples gives.

    Attributes:
        samples: How many calibrated.
        sqnr_db: Outputs against those of the float model, on held-out samples.
        agreement: Share of held-out predictions that are the float model's, 0..1.
        top1: Share of held-out predictions that are right, 0..1; ``None`` without targets.
        ranges: Quantizer of activations -> largest magnitude.
    """

    samples: int
    sqnr_db: float
    agreement: float
    top1: float | None
    ranges: Mapping[str, Tensor] = field(repr=False)

    def range_changes(self, other: CurvePoint) -> dict[str, float]:
        """Return by how much each quantizer's range differs at another size, 0..1."""
        both = [name for name in self.ranges if name in other.ranges]
        return {name: relative_change(self.ranges[name], other.ranges[name]) for name in both}

    def moved(self, other: CurvePoint) -> list[str]:
        """Return in words what differs at another size by more than is allowed."""
        ranges = statistics.median(self.range_changes(other).values())
        agreement = abs(self.agreement - other.agreement)
        same = self.sqnr_db == other.sqnr_db  # both may be infinite
        sqnr = 0.0 if same else abs(self.sqnr_db - other.sqnr_db)
        figures = (
            (ranges > RANGE, f"ranges move by {ranges:.1%} (median)"),
            (agreement > AGREEMENT + 1e-9, f"agreement by {100 * agreement:.2f} points"),
            (sqnr > SQNR_DB, f"SQNR by {sqnr:.2f} dB"),
        )
        return [words for beyond, words in figures if beyond]


def relative_change(before: Tensor, after: Tensor) -> float:
    """Return by how much a range changed: ``max |a - b| / max(a, b)``, over channels; 0..1.

    Example:
        >>> relative_change(torch.tensor(3.0), torch.tensor(4.0))
        0.25
    """
    larger = torch.maximum(before, after)
    change = (before - after).abs() / larger.clamp_min(torch.finfo(larger.dtype).tiny)
    return float(change.max())


@dataclass(frozen=True)
class CalibrationCurve:
    """Calibration with more and more samples; ``print`` shows it as a table.

    A size is **enough** if no larger one differs from it by more than 5% in ranges (median over
    the quantizers of activations), 0.5 points in agreement or 0.5 dB in SQNR, and the largest has
    at least four times as many samples. Where there is no such size, the curve has not settled.

    Attributes:
        points: From the fewest samples to the most.
        calibrator: Which calibrator.
        held_out: Samples that were predicted.
        float_top1: Top-1 of the float model on them, 0..1; ``None`` without targets.
    """

    points: Sequence[CurvePoint]
    calibrator: str
    held_out: int
    float_top1: float | None

    @property
    def enough(self) -> int | None:
        """The fewest samples that are enough; ``None`` where the curve has not settled."""
        return next((p.samples for p in self._judged() if self._first_change(p) is None), None)

    @property
    def verdict(self) -> str:
        """What the curve says, in a sentence."""
        most = self.points[-1].samples
        if self.enough is not None:
            return (
                f"{self.enough} samples are enough: up to {most}, ranges move by at most "
                f"{RANGE:.0%} (median), agreement by {100 * AGREEMENT:g} points and SQNR by "
                f"{SQNR_DB:g} dB."
            )
        judged = self._judged()
        why = self._first_change(judged[-1]) if judged else f"no size has {MORE} times as many"
        clip = ", or with a calibrator that clips" * (self.calibrator == "max")
        return f"Not settled: {why}; calibrate with more than {most} samples{clip}."

    def __str__(self) -> str:
        return "\n".join([self._title(), *_table(self.points), self.verdict])

    def _title(self) -> str:
        top1 = "" if self.float_top1 is None else f", float top-1 {self.float_top1:.2%}"
        return f"calibrator {self.calibrator}, {self.held_out} held-out samples{top1}"

    def _judged(self) -> list[CurvePoint]:
        return [p for p in self.points if self.points[-1].samples >= MORE * p.samples]

    def _first_change(self, point: CurvePoint) -> str | None:
        for other in self.points:
            if other.samples > point.samples and (moved := point.moved(other)):
                return f"from {point.samples} to {other.samples} samples {', '.join(moved)}"
        return None


def _table(points: Sequence[CurvePoint]) -> list[str]:
    lines = ["samples  SQNR dB  agreement    top-1  range change: median     max  in"]
    for before, point in zip([None, *points], points, strict=False):
        top1 = "" if point.top1 is None else f"{point.top1:.2%}"
        line = f"{point.samples:7d}{point.sqnr_db:9.2f}{point.agreement:11.2%}{top1:>9}"
        if before is not None:
            changes = before.range_changes(point)
            worst = max(changes, key=changes.__getitem__)
            median = statistics.median(changes.values())
            line += f"{median:22.1%}{changes[worst]:8.1%}  {worst}"
        lines.append(line)
    return lines
