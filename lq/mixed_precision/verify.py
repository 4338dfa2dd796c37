"""A search whose plan is applied, calibrated and measured, until it keeps what it promised."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lq.costs import Costs
from lq.mixed_precision.bench import Bench, Prepare, find_costs
from lq.mixed_precision.constraints import PrecisionConstraints
from lq.mixed_precision.loop import SearchLoop, Trial
from lq.mixed_precision.searching import SearchedPlan
from lq.sensitivity import Sensitivity
from lq.spec import Recipe

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class VerifiedPlan:
    """A plan that was measured to keep to its limits.

    Attributes:
        plan: The plan.
        model: The model that follows it, calibrated.
        trials: All plans that were measured, the one that was taken among them.
    """

    plan: SearchedPlan
    model: nn.Module
    trials: Sequence[Trial]

    def __str__(self) -> str:
        return "\n".join(map(str, self.trials))


def verified_search(
    model: nn.Module,
    sensitivity: Sensitivity,
    constraints: PrecisionConstraints,
    batches: Iterable[Any],
    held_out: Iterable[Any],
    costs: Costs | None = None,
    recipe: Recipe | str | Path = "tensorrt_int8",
    prepare: Prepare | None = None,
    minimize: str | None = None,
) -> VerifiedPlan:
    """Search a plan, measure it, and search on with what was measured until it keeps to the limits.

    Each plan is applied to a copy of the model, calibrated, and compared with the float model
    sample by sample. Where the upper end of the drop's interval breaks the limit, what was not
    predicted is added to the plan's own choices, shared out by their KL divergence, and another
    plan is searched; likewise with the latency. Where a cost is minimized the search also goes on
    after a plan that keeps to the limits, as long as it finds cheaper ones.

    Args:
        model: The float model; it stays as it is.
        sensitivity: What ``lq.sweep`` found of it.
        constraints: The limits.
        batches: Calibration batches, to be gone through again and again.
        held_out: (input, target) pairs to measure on, others than those of the sweep.
        costs: What layers cost; counted, and where a latency is limited timed, on the first of
            `batches`, if not given.
        recipe: What layers that were not swept get, and which additions and pooling are quantized.
        prepare: What is done to each quantized model, if not ``calibrate(model, batches)``.
        minimize: As for ``search``.

    Raises:
        UnreachableError: If no plan keeps to the limits: which one fails, its nearest value, and
            the model that has it.
        ValueError: If the sweep is of a model with other layers.
    """
    sensitivity.check_model(model)
    first = next(iter(batches))
    costs = costs or find_costs(model, first, constraints, sensitivity.formats, recipe)
    loop = SearchLoop(sensitivity, constraints, costs, minimize)
    bench = Bench(model, batches, held_out, recipe, prepare)
    bench.check_provable(constraints)
    models: dict[Trial, nn.Module] = {}
    while (plan := loop.next_plan()) is not None:
        quantized = bench.prepared(plan)
        trial = loop.judge(plan, bench.drop(quantized), bench.latency(quantized, loop.timed_by))
        log.info("%s", trial)
        wanted = loop.kept or loop.nearest
        models = {k: m for k, m in [*models.items(), (trial, quantized)] if k is wanted}
    if loop.kept is None:
        error = loop.failed()
        error.nearest = models[loop.nearest]
        raise error
    return VerifiedPlan(loop.kept.plan, models[loop.kept], loop.trials)
