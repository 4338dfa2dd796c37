"""Apply plans to copies of a float model, and measure them against it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lq.batches import check_repeatable
from lq.calibration import calibrate
from lq.costs import Costs, count_costs
from lq.mixed_precision.constraints import PrecisionConstraints
from lq.mixed_precision.measured import rightness
from lq.paired import Drop, paired_drop
from lq.spec import Recipe
from lq.surgery import quantize, quantizers

Prepare = Callable[[nn.Module], Any]
"""What is done to a quantized model before it is measured."""


def find_costs(
    model: nn.Module,
    batch: Any,
    constraints: PrecisionConstraints,
    formats: Sequence[str],
    recipe: Recipe | str | Path,
) -> Costs:
    """Return what the layers of a model cost, with their time where that is limited."""
    if not constraints.is_timed:
        return count_costs(model, batch)
    from lq.latency import measure_latency  # which imports every engine

    return measure_latency(model, batch, formats, recipe=recipe)


class Bench:
    """Applies plans to copies of the float model, and measures them against it.

    Args:
        model: The float model; it stays as it is.
        batches: Calibration batches.
        held_out: (input, target) pairs to measure on.
        recipe: What layers that a plan does not name get, and which additions and pooling are
            quantized.
        prepare: What is done to each quantized model, if not ``calibrate(model, batches)``.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        held_out: Iterable[Any],
        recipe: Recipe | str | Path,
        prepare: Prepare | None,
    ) -> None:
        check_repeatable(batches, "batches")
        check_repeatable(held_out, "held_out")
        self.model, self.recipe, self.held_out = model, recipe, held_out
        self.right, self.sample = rightness(model, held_out), next(iter(batches))
        self.prepare = prepare or (lambda net: calibrate(net, batches, progress=False))

    def check_provable(self, constraints: PrecisionConstraints) -> None:
        """Raise a ``ValueError`` where there are too few samples to show so small a drop."""
        limit, least = constraints.max_accuracy_drop, paired_drop(self.right, self.right).high
        if limit is not None and least > limit:
            raise ValueError(
                f"Expected enough samples in `held_out` to show a drop of {limit:g}, but got "
                f"{len(self.right)}, which show {least:.2g} where none is lost; give more of them."
            )

    def prepared(self, plan: Mapping[str, str]) -> nn.Module:
        """Return a copy of the float model that follows a plan."""
        quantized = quantize(copy.deepcopy(self.model), Recipe.from_plan(plan, self.recipe))
        if quantizers(quantized):
            self.prepare(quantized)
        return quantized

    def drop(self, quantized: nn.Module) -> Drop:
        """Return what a model lost."""
        return paired_drop(self.right, rightness(quantized, self.held_out))

    def latency(self, quantized: nn.Module, engine: str | None) -> float | None:
        """Return the time of one sample in an engine, ``None`` without one."""
        if not engine:
            return None
        from lq.latency import file_latency  # which imports every engine

        return file_latency(quantized, self.sample, engine)
