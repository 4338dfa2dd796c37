"""What explains how a model takes to quantization: its ranges, tensors and weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lq.calibration import calibrate
from lq.convergence import calibration_curve
from lq.distribution import TensorHistogram, tensor_histograms
from lq.rounding import WeightError, weight_error
from lq.spec import Recipe
from lq.surgery import quantize, quantized_layers, quantizers


@dataclass(frozen=True)
class CalibrationSize:
    """How many calibration samples there were, and whether they are enough.

    Attributes:
        samples: How many there were.
        enough: The fewest that are enough; ``None`` where even all are not.
        verdict: What the calibration curve says, in a sentence.
    """

    samples: int
    enough: int | None
    verdict: str


@dataclass(frozen=True)
class Explanation:
    """What was looked at besides the methods, with the recipe of those that name none.

    Attributes:
        calibration: Whether there were enough calibration samples; ``None`` where inputs have no
            ranges.
        ranges: Quantizer -> amax by ``max``, one for each channel.
        histograms: What some layers read, with the clip points of the calibrators.
        weights: Weights of some layers, before and after.
    """

    calibration: CalibrationSize | None = None
    ranges: Mapping[str, Sequence[float]] = dataclasses.field(default_factory=dict)
    histograms: Sequence[TensorHistogram] = ()
    weights: Sequence[WeightError] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; ``from_dict`` gives it back."""
        return {
            "calibration": self.calibration and dataclasses.asdict(self.calibration),
            "ranges": dict(self.ranges),
            "histograms": [histogram.to_dict() for histogram in self.histograms],
            "weights": [error.to_dict() for error in self.weights],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Explanation:
        """Return the explanation that ``to_dict`` wrote, also by way of JSON."""
        size = values["calibration"]
        return cls(
            None if size is None else CalibrationSize(**size),
            values["ranges"],
            [TensorHistogram.from_dict(histogram) for histogram in values["histograms"]],
            [WeightError.from_dict(error) for error in values["weights"]],
        )


def explain(
    model: nn.Module,
    batches: Iterable[Any],
    held_out: Iterable[Any],
    recipe: Recipe,
    layers: Sequence[str],
    progress: bool = True,
) -> Explanation:
    """Look at ranges, tensors and weights of a model, and at how many samples it needs.

    Args:
        model: The float model; it stays as it is.
        batches: Calibration batches.
        held_out: Other batches.
        recipe: How it is quantized.
        layers: Layers whose tensors and weights are looked at; those that have no codes are not.
        progress: Show progress bars.
    """
    net = quantize(copy.deepcopy(model), recipe)
    if not quantizers(net):
        return Explanation()
    size = _calibration_size(net, batches, held_out, progress)
    calibrate(net, batches, progress=progress)
    amax = {name: quantizer.amax for name, quantizer in quantizers(net).items()}
    ranges = {name: x.flatten().tolist() for name, x in amax.items() if x is not None}
    quantized = quantized_layers(net)
    coded = [n for n in layers if n in quantized and quantized[n].weight_quantizer.spec.needs_scale]
    inputs = [name for n in coded if (name := f"{n}.input_quantizer") in ranges]
    return Explanation(
        size,
        ranges,
        list(tensor_histograms(net, batches, inputs).values()),
        [weight_error(quantized[name], name=name) for name in coded],
    )


def _calibration_size(
    model: nn.Module, batches: Iterable[Any], held_out: Iterable[Any], progress: bool
) -> CalibrationSize | None:
    """Return whether there are enough samples, ``None`` where only weights have ranges."""
    ranged = [name for name, quantizer in quantizers(model).items() if quantizer.spec.needs_scale]
    if all(name.endswith("weight_quantizer") for name in ranged):
        return None
    curve = calibration_curve(model, batches, held_out, progress=progress)
    return CalibrationSize(curve.points[-1].samples, curve.enough, curve.verdict)
