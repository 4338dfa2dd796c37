"""Search the best plan under limits, and the front of best plans against what they cost."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lq.costs import QUANTITIES, Costs
from lq.messages import suggest
from lq.mixed_precision.constraints import Limit, PrecisionConstraints, UnreachableError
from lq.mixed_precision.problem import Array, Problem, build_problem, ties
from lq.mixed_precision.solver import solve_exactly, solve_greedily
from lq.plan import PrecisionPlan
from lq.sensitivity import Sensitivity

log = logging.getLogger(__name__)
MINIMIZE = ("score", *QUANTITIES)


@dataclass(frozen=True)
class Prediction:
    """What a plan is expected to be, by adding up its layers; nothing here is measured on the plan.

    Attributes:
        score: Sum of the sweep's metric.
        drop: Accuracy drop, 0..1.
        size_mb: Size of weights, scales, biases and the rest, in 10^6 bytes.
        bitops: Bit operations for one sample.
        latency_ms: Milliseconds for one sample, by measured latencies of single layers.
    """

    score: float
    drop: float
    size_mb: float | None = None
    bitops: float | None = None
    latency_ms: float | None = None

    def __str__(self) -> str:
        parts = [f"drop {self.drop:.2%}"]
        parts += [f"{self.size_mb:.3f} MB"] if self.size_mb is not None else []
        parts += [f"{self.bitops / 1e9:.2f} G bit operations"] if self.bitops is not None else []
        parts += [f"{self.latency_ms:.2f} ms"] if self.latency_ms is not None else []
        return ", ".join(parts)


class SearchedPlan(PrecisionPlan):
    """A plan that was searched, with what was predicted of it.

    Attributes:
        units: Unit -> format, as the sweep had them.
        predicted: What the exact search expects of it.
        greedy: What the greedy search found, to compare; ``None`` if it found no way.
    """

    def __init__(
        self,
        formats: Mapping[str, str],
        units: Mapping[str, str],
        predicted: Prediction,
        greedy: Prediction | None = None,
    ) -> None:
        super().__init__(formats)
        self.units, self.predicted, self.greedy = dict(units), predicted, greedy


def search(
    sensitivity: Sensitivity,
    constraints: PrecisionConstraints,
    costs: Costs | None = None,
    minimize: str | None = None,
) -> SearchedPlan:
    """Return the best plan under limits, by predictions; ``verified_search`` measures it.

    An integer programme, solved exactly: every unit of the sweep gets one format, and what single
    units cost adds up. Negative scores count as 0. The same arguments always give the same plan.

    Args:
        sensitivity: What ``lq.sweep`` found.
        constraints: The limits.
        costs: What layers cost (``lq.count_costs``, ``lq.measure_latency``); those that the sweep
            counted, if not given.
        minimize: ``score`` (the sweep's metric), ``size_mb``, ``bitops`` or ``latency_ms``; if not
            given, the score where a cost is limited, and the size where only accuracy is.

    Raises:
        UnreachableError: If no plan keeps to the limits, a ``ValueError`` that says which one fails
            and its nearest value.

    Example:
        >>> import torch
        >>> from lq.costs import count_costs
        >>> from lq.sensitivity import LayerSensitivity
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 8))
        >>> rows = [LayerSensitivity(layer=n, format="int8", top1_drop=d)
        ...         for n, d in (("0", 0.001), ("1", 0.02))]
        >>> swept = Sensitivity(found=rows, units={"0": ("0",), "1": ("1",)}, formats=("int8",),
        ...                     method="exact", metric="top1", n=1000)
        >>> costs = count_costs(model, torch.zeros(1, 64))
        >>> plan = search(swept, PrecisionConstraints(max_accuracy_drop=0.01), costs)
        >>> dict(plan), plan.predicted.drop
        ({'0': 'int8', '1': 'fp32'}, 0.001)
        >>> search(swept, PrecisionConstraints(max_size_mb=0.004), costs)
        Traceback (most recent call last):
        lq.mixed_precision.constraints.UnreachableError: Expected `max_size_mb` to be reachable, but
        got 0.004; the nearest is 0.005192.
    """
    costs = sensitivity.costs if costs is None else costs
    if constraints.max_accuracy_drop is not None and math.isnan(sensitivity.top1):
        log.warning(
            "The sweep measured no top-1: `max_accuracy_drop` limits its %s instead; measure the "
            "plan with lq.verified_search.",
            sensitivity.metric,
        )
    problem = build_problem(sensitivity, constraints, costs)
    return solve(problem, constraints.limits(costs), sensitivity, costs, minimize)


def solve(
    problem: Problem,
    limits: Sequence[Limit],
    sensitivity: Sensitivity,
    costs: Costs | None,
    minimize: str | None = None,
    without: Sequence[SearchedPlan] = (),
) -> SearchedPlan:
    """Return the best plan of a problem, checked against what a greedy search finds.

    Plans in `without` are left out; what is then found is not checked.
    """
    check_reachable(problem, limits)
    objective, tie = _objective(problem, minimize or to_minimize(limits), sensitivity)
    left_out = [problem.chosen(plan.units) for plan in without]
    exact = solve_exactly(problem, objective, limits, tie, left_out)
    if exact is None:
        raise UnreachableError("Expected another plan that keeps to the limits, but found none.")
    greedy = None if without else solve_greedily(problem, objective, limits)
    if greedy is not None and objective[greedy].sum() < objective[exact].sum() * (1 - 1e-6):
        log.warning("The greedy search found a better plan than the exact one, which is taken.")
        exact = greedy
    return _searched(problem, exact, greedy, sensitivity, costs)


def pareto_front(
    sensitivity: Sensitivity,
    costs: Costs | None = None,
    against: str = "size_mb",
    points: int = 16,
    formats: Sequence[str] | None = None,
    pinned: Mapping[str, str] | None = None,
) -> list[SearchedPlan]:
    """Return the plans of smallest score for limits on a cost from its least to its most.

    No plan of the list is beaten by another in both score and cost; the cheapest comes first.

    Args:
        sensitivity: What ``lq.sweep`` found.
        costs: What layers cost, as for ``search``.
        against: ``size_mb``, ``bitops`` or ``latency_ms``.
        points: How many limits to try.
        formats: Formats that layers may have.
        pinned: As in ``PrecisionConstraints``.
    """
    if against not in QUANTITIES:
        raise ValueError(
            f"Expected `against` to be of {', '.join(QUANTITIES)}, but got {against!r}; "
            f"{suggest(against, QUANTITIES)}"
        )
    costs = sensitivity.costs if costs is None else costs
    free = PrecisionConstraints(max_accuracy_drop=0.0, formats=formats, pinned=pinned or {})
    problem = build_problem(sensitivity, free, costs)
    _check_counted(problem, against)
    drop, cost = problem.values["drop"], problem.values[against]
    ends = solve_exactly(problem, cost, (), drop), solve_exactly(problem, drop, (), cost)
    low, high = (problem.total(against, chosen) for chosen in ends if chosen is not None)
    front: list[SearchedPlan] = []
    for bound in np.linspace(low, high, points):
        limit = Limit(against, float(bound), against, float(bound) * (1 + 1e-9))
        chosen = solve_exactly(problem, drop, [limit], cost)
        if chosen is None:
            continue
        plan = _searched(problem, chosen, None, sensitivity, costs)
        if not front or plan.predicted.score < front[-1].predicted.score:
            front.append(plan)
    return front


def check_reachable(problem: Problem, limits: Sequence[Limit]) -> None:
    """Raise an ``UnreachableError`` for the first limit that those before it leave no room for."""
    for index, limit in enumerate(limits):
        for others in ([], limits[:index])[: index + 1]:
            best = solve_exactly(problem, problem.values[limit.quantity], others)
            least = problem.total(limit.quantity, best) if best is not None else np.inf
            if not limit.allows(least):
                beside = ", ".join(f"{other.name}={other.given:g}" for other in others)
                raise UnreachableError(
                    f"Expected `{limit.name}` to be reachable{' beside ' * bool(beside)}{beside}, "
                    f"but got {limit.given:g}; the nearest is {limit.nearest(least):.4g}."
                )


def to_minimize(limits: Sequence[Limit]) -> str:
    """Return what is minimized unless told: the size where only the drop is limited."""
    return "score" if any(limit.quantity != "drop" for limit in limits) else "size_mb"


def _objective(problem: Problem, wanted: str, sensitivity: Sensitivity) -> tuple[Array, Array]:
    """Return what is minimized for each choice, and what decides ties.

    The drop is the score in other terms, and with what was measured of plans.
    """
    if wanted not in MINIMIZE:
        raise ValueError(
            f"Expected `minimize` to be of {', '.join(MINIMIZE)}, but got {wanted!r}; "
            f"{suggest(wanted, MINIMIZE)}"
        )
    _check_counted(problem, wanted)
    if wanted != "score":
        return problem.values[wanted], problem.values["drop"]
    by_size = problem.values.get("size_mb", np.zeros(len(problem.formats)))
    # Less than half of one sample, all units together.
    nearly = ties(problem, sensitivity) * 0.5 / max(sensitivity.n, 1)
    exact_counts = sensitivity.metric in ("top1", "top5")
    return problem.values["drop"] + nearly * exact_counts, by_size


def _check_counted(problem: Problem, quantity: str) -> None:
    if quantity not in problem.values:
        source = "measure_latency" if quantity == "latency_ms" else "count_costs"
        raise ValueError(
            f"Expected `costs` with `{quantity}`, but got none; give lq.{source}(model, batch)."
        )


def _searched(
    problem: Problem,
    chosen: Array,
    greedy: Array | None,
    sensitivity: Sensitivity,
    costs: Costs | None,
) -> SearchedPlan:
    units = problem.plan(chosen)
    formats = {name: "fp32" for name in costs.layers} if costs is not None else {}
    formats |= {name: units[u] for u, layers in sensitivity.units.items() for name in layers}
    other = None if greedy is None else predict(problem, greedy)
    return SearchedPlan(formats, units, predict(problem, chosen), other)


def predict(problem: Problem, chosen: Array) -> Prediction:
    """Return what is expected of a choice."""
    return Prediction(**{quantity: problem.total(quantity, chosen) for quantity in problem.values})
