"""Two ways to the best choice: an exact integer programme, and a greedy one to check it by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from lq.mixed_precision.constraints import Limit
from lq.mixed_precision.constraints import keeps_to as within
from lq.mixed_precision.problem import Array, Problem

_TOLERANCE = 1e-9
_SCALE, _TIE = 1e4, 1e-2
"""Objectives in the solver's numbers: its absolute gap, 1e-6, is then nothing, and what decides
ties is a millionth of what is minimized."""


def solve_exactly(
    problem: Problem,
    minimize: Array,
    limits: Iterable[Limit],
    tie: Array | None = None,
    without: Iterable[Array] = (),
) -> Array | None:
    """Return the best choice for every unit, by HiGHS's branch and bound; ``None`` without any.

    ``min sum(minimize * x)``, ``x`` in {0, 1}, one choice for each unit,
    ``sum(quantity * x) <= bound`` for each limit.

    Args:
        problem: The choices.
        minimize: What is minimized, for each choice.
        limits: What must be kept to.
        tie: What decides between choices equally good.
        without: Choices that are not to be returned.
    """
    objective = _SCALE * _normalized(minimize)
    if tie is not None:
        objective = objective + _TIE * _normalized(tie)
    count, units = len(problem.formats), len(problem.units)
    member = (problem.unit_of == np.arange(units)[:, None]).astype(float)
    rows, limits = [LinearConstraint(member, 1, 1)], list(limits)
    for limit in limits:
        left = limit.bound - problem.fixed[limit.quantity]
        if left < 0:
            return None
        values = problem.values[limit.quantity]
        scale = max(left, float(values.max()), np.finfo(float).tiny)
        rows.append(LinearConstraint(values[None] / scale, ub=left / scale))
    rows += [_without(problem, chosen) for chosen in without]
    while True:
        found = milp(
            objective,
            integrality=np.ones(count),
            bounds=Bounds(0, 1),
            constraints=rows,
            options={"mip_rel_gap": 0.0},
        )
        if found.x is None:
            return None
        chosen = np.array([c[found.x[c].argmax()] for c in map(problem.choices, range(units))])
        if keeps_to(problem, chosen, limits):
            return chosen
        rows.append(_without(problem, chosen))  # the solver's tolerance let it pass


def _without(problem: Problem, chosen: Array) -> LinearConstraint:
    """Return the constraint that at least one unit is chosen otherwise."""
    taken = np.zeros(len(problem.formats))
    taken[chosen] = 1
    return LinearConstraint(taken[None], ub=len(problem.units) - 1)


def solve_greedily(problem: Problem, minimize: Array, limits: Sequence[Limit]) -> Array | None:
    """Return a good choice: from the lowest scores on, always the exchange best for its score.

    First until the limits are kept to, then as long as what is minimized falls. ``None`` where it
    finds no way to the limits, though there may be one.
    """
    score = problem.values["score"]
    chosen = np.array(
        [c[score[c].argmin()] for c in map(problem.choices, range(len(problem.units)))]
    )
    while (excess := _excess(problem, chosen, limits)) > 0:
        gain = {
            move: excess - _excess(problem, _moved(problem, chosen, move), limits)
            for move in _moves(problem, chosen)
        }
        step = _best(problem, chosen, gain)
        if step is None:
            return None
        chosen = _moved(problem, chosen, step)
    while True:
        gain = {
            move: float(minimize[chosen[problem.unit_of[move]]] - minimize[move])
            for move in _moves(problem, chosen)
            if keeps_to(problem, _moved(problem, chosen, move), limits)
        }
        step = _best(problem, chosen, gain)
        if step is None:
            return chosen
        chosen = _moved(problem, chosen, step)


def keeps_to(problem: Problem, chosen: Array, limits: Iterable[Limit]) -> bool:
    """Return whether a choice is within all limits."""
    limits = list(limits)
    return within(limits, {x.quantity: problem.total(x.quantity, chosen) for x in limits})


def _normalized(values: Array) -> Array:
    largest = float(np.abs(values).max(initial=0.0))
    scaled: Array = values / largest if largest else values
    return scaled


def _moves(problem: Problem, chosen: Array) -> list[int]:
    return [i for i in range(len(problem.formats)) if i not in set(chosen.tolist())]


def _moved(problem: Problem, chosen: Array, move: int) -> Array:
    after: Array = chosen.copy()
    after[problem.unit_of[move]] = move
    return after


def _best(problem: Problem, chosen: Array, gain: dict[int, float]) -> int | None:
    """Return the exchange that gains most for what it adds to the score, if one gains anything."""
    score = problem.values["score"]
    smallest = _TOLERANCE * max(float(score.max(initial=0.0)), _TOLERANCE)

    def worth(move: int) -> float:
        added = float(score[move] - score[chosen[problem.unit_of[move]]])
        return gain[move] / max(added, smallest)

    gaining = [move for move in gain if gain[move] > _TOLERANCE * 1e-3]
    return max(gaining, key=worth, default=None)


def _excess(problem: Problem, chosen: Array, limits: Sequence[Limit]) -> float:
    """Return by how much a choice breaks its limits, each in parts of its bound."""
    over = 0.0
    for limit in limits:
        if not keeps_to(problem, chosen, [limit]):
            over += problem.total(limit.quantity, chosen) / max(limit.bound, _TOLERANCE) - 1
    return over
