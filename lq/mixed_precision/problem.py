"""The choice of a format for every unit, as numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lq.costs import QUANTITIES, Costs
from lq.formats import FORMATS, layer_formats
from lq.mixed_precision.constraints import PrecisionConstraints
from lq.sensitivity import Sensitivity

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """One format for each unit, and what each choice costs.

    Attributes:
        units: Name of each unit.
        formats: Format of each choice.
        unit_of: Index of the unit of each choice, ascending.
        values: Quantity -> its value for each choice: ``score``, ``drop``, and what the costs give.
        fixed: Quantity -> its value for all that is no unit.
    """

    units: tuple[str, ...]
    formats: tuple[str, ...]
    unit_of: Array
    values: dict[str, Array]
    fixed: dict[str, float]

    def total(self, quantity: str, chosen: Sequence[int] | Array) -> float:
        """Return a quantity of a whole plan, given the index of each unit's choice."""
        return self.fixed[quantity] + math.fsum(self.values[quantity][np.asarray(chosen)])

    def choices(self, unit: int) -> Array:
        """Return the indices of a unit's choices."""
        return np.flatnonzero(self.unit_of == unit)

    def plan(self, chosen: Sequence[int] | Array) -> dict[str, str]:
        """Return unit -> format of a whole plan."""
        return {self.units[self.unit_of[i]]: self.formats[i] for i in chosen}

    def chosen(self, plan: Mapping[str, str]) -> Array:
        """Return the choices of a plan: the reverse of ``plan``."""
        pairs = zip((self.units[i] for i in self.unit_of), self.formats, strict=True)
        return np.array([i for i, (unit, format) in enumerate(pairs) if plan[unit] == format])


def build_problem(
    sensitivity: Sensitivity,
    constraints: PrecisionConstraints,
    costs: Costs | None,
    corrections: Mapping[tuple[str, str], float] | None = None,
) -> Problem:
    """Return the problem that sensitivities, constraints and costs pose.

    Formats in which a unit overflows, so that its score is infinite, are no choices.

    Args:
        sensitivity: What a sweep found.
        constraints: Which formats units may have.
        costs: What layers cost; without them there are scores and drops alone.
        corrections: Unit and format -> accuracy drop to add, by what was measured of plans.

    Raises:
        ValueError: If a unit overflows in all formats that it may have, or in its pinned one, or a
            pin matches nothing that was swept.
    """
    swept = {name for layers in sensitivity.units.values() for name in layers}
    unswept = [name for name in (costs.layers if costs is not None else ()) if name not in swept]
    constraints.check_pins([*sensitivity.units, *swept, *unswept])
    _check_unswept(constraints, unswept)
    constraints = constraints.by_layer(sensitivity.units)
    pairs = [
        (index, format)
        for index, unit in enumerate(sensitivity.units)
        for format in _formats(sensitivity, constraints, unit, costs)
    ]
    units = tuple(sensitivity.units)
    score = np.array([max(sensitivity.score(units[i], f), 0.0) for i, f in pairs])
    drop = accuracy_per_score(sensitivity) * score
    drop = np.maximum(drop + [(corrections or {}).get((units[i], f), 0.0) for i, f in pairs], 0.0)
    values, fixed = {"score": score, "drop": drop}, {"score": 0.0, "drop": 0.0}
    quantities = [q for q in QUANTITIES if q != "latency_ms" or (costs and costs.latency)]
    for quantity in quantities if costs is not None else ():
        assert costs is not None
        values[quantity] = np.array(
            [_unit_cost(costs, quantity, sensitivity.units[units[i]], f) for i, f in pairs]
        )
        fixed[quantity] = costs.rest(quantity) + sum(costs.of(quantity, n, "fp32") for n in unswept)
    return Problem(
        units, tuple(f for _, f in pairs), np.array([i for i, _ in pairs]), values, fixed
    )


def _unit_cost(costs: Costs, quantity: str, layers: Sequence[str], format: str) -> float:
    """Return what layers cost; of a size with the copy of a weight that a layer outside shares.

    A layer outside that shares a weight stays float, since layers that are swept share a unit.
    """
    if quantity != "size_mb":
        return sum(costs.of(quantity, name, format) for name in layers)
    floats = sum(costs.of(quantity, name, "fp32") for name in layers)
    more = costs.total(quantity, dict.fromkeys(layers, format)) - costs.total(quantity, {})
    return floats + more


def ties(problem: Problem, sensitivity: Sensitivity) -> Array:
    """Return what decides between choices of equal score: the KL divergence, scaled to at most 1.

    Accuracy counts samples, so that many layers share a score of none or one.
    """
    units = [problem.units[i] for i in problem.unit_of]
    rows = zip(units, problem.formats, strict=True)
    kl = np.array([0.0 if f == "fp32" else sensitivity.row(u, f).kl for u, f in rows])
    kl = np.maximum(kl, 0.0)
    kl = np.nan_to_num(kl, posinf=kl[np.isfinite(kl)].max(initial=0.0))
    scaled: Array = kl / kl.sum() if kl.sum() > 0 else kl
    return scaled


def accuracy_per_score(sensitivity: Sensitivity) -> float:
    """Return the top-1 lost for one of the sweep's metric, over all its rows together.

    ``sum(top1_drop) / sum(max(score, 0))``, with one sample where none was lost; and 1 where the
    sweep had no class numbers: the score stands for the drop until a plan is measured. Rows that
    overflow do not count.
    """
    metric = sensitivity.metric
    if metric == "top1":
        return 1.0
    rows = [r for r in sensitivity if r.part == "both" and math.isfinite(r.cost(metric))]
    drop = sum(r.top1_drop for r in rows)
    score = sum(max(r.cost(metric), 0.0) for r in rows)
    if math.isnan(drop) or not score > 0:
        return 1.0
    return max(drop, 1 / max(sensitivity.n, 1)) / score


def _check_unswept(constraints: PrecisionConstraints, layers: Sequence[str]) -> None:
    for layer in layers:
        if constraints.pin(layer) not in (None, "fp32"):
            raise ValueError(
                f"Expected a pinned layer to be one that was swept, but {layer!r} was not; sweep "
                "it with a recipe that does not skip it, or pin it to fp32."
            )


def _formats(
    sensitivity: Sensitivity, constraints: PrecisionConstraints, unit: str, costs: Costs | None
) -> tuple[str, ...]:
    """Return the formats that a unit may have and does not overflow in, the widest first.

    Unless they are named, that leaves out what the engine that was timed does not run.
    """
    swept = ("fp32", *sensitivity.formats)
    pinned = _pin(sensitivity, constraints, unit)
    run = [f for f in swept if costs is None or costs.runs(f)]
    wanted = (pinned,) if pinned else constraints.formats or run
    for format in wanted:
        if format not in swept:
            raise ValueError(
                f"Expected the sweep to hold every format of the plan, but {format!r} is not among "
                f"{', '.join(swept)}; sweep with formats=[..., {format!r}]."
            )
    finite = [f for f in dict.fromkeys(wanted) if math.isfinite(sensitivity.score(unit, f))]
    if not finite:
        raise ValueError(
            f"Expected unit {unit!r} to have finite outputs in a format that it may have, but it "
            f"overflows in {', '.join(wanted)}; allow or pin another, such as bf16 or fp32."
        )
    return tuple(sorted(finite, key=_bits, reverse=True))


def _bits(format: str) -> int:
    return sum(FORMATS[part].bits for part in layer_formats(format))


def _pin(sensitivity: Sensitivity, constraints: PrecisionConstraints, unit: str) -> str | None:
    pins = {constraints.pin(layer) for layer in sensitivity.units[unit]}
    if len(pins) > 1:
        raise ValueError(
            f"Expected one pinned format for all layers of unit {unit!r}, but got "
            f"{', '.join(sorted(str(pin) for pin in pins))}; pin the unit, or sweep layer by layer."
        )
    return pins.pop()
