"""A search whose plan is applied, calibrated and measured, until it keeps what it promised."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lq.calibration import calibrate
from lq.costs import Costs, count_costs
from lq.latency import file_latency
from lq.mixed_precision.constraints import Limit, PrecisionConstraints
from lq.mixed_precision.measured import Drop, paired_drop, rightness
from lq.mixed_precision.problem import build_problem
from lq.mixed_precision.search import SearchedPlan, solve
from lq.sensitivity import Sensitivity
from lq.spec import Recipe
from lq.surgery import quantize, quantizers

log = logging.getLogger(__name__)
ROUNDS = 12
"""Plans to measure before giving up."""
Prepare = Callable[[nn.Module], Any]
"""What is done to a quantized model before it is measured."""


@dataclass(frozen=True)
class Trial:
    """One plan: what was predicted of it, and what was measured.

    Attributes:
        plan: The plan, with its predictions.
        drop: Accuracy lost.
        latency_ms: Time of one sample in the exported graph; ``None`` where none is limited.
        kept: Whether it keeps to all limits.
    """

    plan: SearchedPlan
    drop: Drop
    latency_ms: float | None
    kept: bool

    def __str__(self) -> str:
        measured = str(self.drop)
        if self.latency_ms is not None:
            measured += f", {self.latency_ms:.2f} ms"
        end = "kept" if self.kept else "refused"
        return f"{self.plan}: predicted {self.plan.predicted}; measured {measured}; {end}"


@dataclass(frozen=True)
class VerifiedPlan:
    """A plan that was measured to keep to its limits.

    Attributes:
        plan: The plan.
        model: The model that follows it, calibrated.
        trials: All plans that were measured, this one last.
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
    predicted is added to the plan's own choices, shared out by their KL divergence, and the search
    is done again; likewise with the latency.

    Args:
        model: The float model; it stays as it is.
        sensitivity: What ``lq.sweep`` found of it.
        constraints: The limits.
        batches: Calibration batches, to be gone through again and again.
        held_out: (input, target) pairs to measure on, others than those of the sweep.
        costs: What layers cost; counted on the first of `batches`, if not given.
        recipe: What additions, pooling, and layers that were not swept get.
        prepare: What is done to each quantized model, if not ``calibrate(model, batches)``.
        minimize: As for ``search``.

    Raises:
        ValueError: If no plan keeps to the limits: which one fails, and its nearest value.
    """
    reference, right = copy.deepcopy(model), rightness(model, held_out)
    _check_provable(constraints, right)
    sample = next(iter(batches))
    costs = count_costs(reference, sample) if costs is None else costs
    limits = constraints.limits(costs)
    corrections: dict[tuple[str, str], float] = {}
    trials: list[Trial] = []
    more_ms = 0.0
    while len(trials) < ROUNDS:
        problem = build_problem(sensitivity, constraints, costs, corrections)
        if "latency_ms" in problem.fixed:
            problem.fixed["latency_ms"] += more_ms
        try:
            plan = solve(problem, limits, sensitivity, costs, minimize)
        except ValueError as error:
            raise _failed(error, trials) from None
        quantized = prepared(reference, plan, recipe, prepare or _calibration(batches))
        trial = _tried(quantized, plan, right, held_out, sample, limits)
        trials.append(trial)
        log.info("%s", trial)
        if trial.kept:
            return VerifiedPlan(plan, quantized, trials)
        _learn(corrections, trial, sensitivity)
        more_ms += max((trial.latency_ms or 0.0) - (plan.predicted.latency_ms or 0.0), 0.0)
    raise _failed(ValueError(f"Expected a plan within {ROUNDS} trials, but none kept."), trials)


def prepared(
    model: nn.Module, plan: SearchedPlan, recipe: Recipe | str | Path, prepare: Prepare
) -> nn.Module:
    """Return a copy of a float model that follows a plan."""
    quantized = quantize(copy.deepcopy(model), Recipe.from_plan(plan, recipe))
    if quantizers(quantized):
        prepare(quantized)
    return quantized


def _calibration(batches: Iterable[Any]) -> Prepare:
    return lambda model: calibrate(model, batches, progress=False)


def _tried(
    model: nn.Module,
    plan: SearchedPlan,
    right: Tensor,
    held_out: Iterable[Any],
    sample: Any,
    limits: Sequence[Limit],
) -> Trial:
    drop = paired_drop(right, rightness(model, held_out))
    timed = any(limit.quantity == "latency_ms" for limit in limits)
    latency = file_latency(model, sample) if timed else None
    measured = {**dataclasses.asdict(plan.predicted), "drop": drop.high, "latency_ms": latency}
    kept = all(measured[limit.quantity] <= limit.bound * (1 + 1e-9) for limit in limits)
    return Trial(plan, drop, latency, kept)


def _learn(
    corrections: dict[tuple[str, str], float], trial: Trial, sensitivity: Sensitivity
) -> None:
    """Add what a plan lost beyond its prediction to the choices that it is made of."""
    unforeseen = trial.drop.high - trial.plan.predicted.drop
    chosen = [pair for pair in trial.plan.units.items() if pair[1] != "fp32"]
    kl = [max(sensitivity.row(*pair).kl, 0.0) for pair in chosen]
    for pair, part in zip(chosen, kl, strict=True):
        share = part / sum(kl) if sum(kl) > 0 else 1 / len(chosen)
        corrections[pair] = corrections.get(pair, 0.0) + max(unforeseen, 0.0) * share


def _check_provable(constraints: PrecisionConstraints, right: Tensor) -> None:
    limit, least = constraints.max_accuracy_drop, paired_drop(right, right).high
    if limit is not None and least > limit:
        raise ValueError(
            f"Expected enough samples in `held_out` to show a drop of at most {limit:g}, but got "
            f"{len(right)}, which show {least:.2g} at best, where none is lost; give more of them."
        )


def _failed(error: ValueError, trials: Sequence[Trial]) -> ValueError:
    if not trials:
        return error
    best = min(trials, key=lambda trial: trial.drop.high)
    return ValueError(
        f"{str(error).rstrip('.')}, by predictions with what was measured of {len(trials)} plans; "
        f"the best of these has a {best.drop}, with {best.plan.predicted.size_mb:.4g} MB."
    )
