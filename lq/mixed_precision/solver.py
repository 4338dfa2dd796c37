"""Two ways to the best choice: an exact integer programme, and a greedy one to check it by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from lq.mixed_precision.constraints import Limit
from lq.mixed_precision.constraints import keeps_to as within
from lq.mixed_precision.problem import Array, Problem

_TOLERANCE = 1e-9
_SCALE = 1e7
"""What bounds are in the solver's numbers: its tolerance, 1e-6, is then nothing beside them."""
_STEPS = {"size_mb": 8e6, "bitops": 1.0}
"""Quantities that are whole numbers of something, a bit of storage or a bit operation."""
_TRIES = 8
"""Plans a hair above a bound that are refused one by one, before the bound is lowered by a hair."""
_GAP = 1e-2
"""The least part of its largest choice that a sum may be for the solver's gap to be nothing."""


def solve_exactly(
    problem: Problem,
    minimize: Array,
    limits: Iterable[Limit],
    tie: Array | None = None,
    without: Iterable[Array] = (),
) -> Array | None:
    """Return the best choice for every unit, by HiGHS's branch and bound; ``None`` without any.

    ``min sum(minimize * x)``, ``x`` in {0, 1}, one choice for each unit,
    ``sum(quantity * x) <= bound`` for each limit; then the least of `tie` among what is as good.

    Args:
        problem: The choices.
        minimize: What is minimized, for each choice; not negative.
        limits: What must be kept to.
        tie: What decides between choices equally good.
        without: Choices that are not to be returned.
    """
    programme = _Programme(problem, list(limits), without)
    best = programme.least(minimize)
    if best is None or tie is None:
        return best
    programme.limit(minimize, float(minimize[best].sum()))
    decided = programme.least(tie)
    return best if decided is None else decided


class _Programme:
    """The integer programme of a problem, in numbers that the solver is exact in.

    It takes what differs by 1e-6 for equal. So choices that alone are above a bound are left out,
    values are those above each unit's least, and whole numbers are divided by what they have in
    common.
    """

    def __init__(self, problem: Problem, limits: list[Limit], without: Iterable[Array]) -> None:
        self.problem, self.limits = problem, limits
        count, units = len(problem.formats), len(problem.units)
        member = (problem.unit_of == np.arange(units)[:, None]).astype(float)
        self.rows = [LinearConstraint(member, 1, 1)]
        self.rows += [_without(problem, chosen) for chosen in without]
        self.bounds: list[tuple[Array, float]] = []
        self.allowed = np.ones(count, dtype=bool)
        for limit in limits:
            bound = limit.bound * (1 + _TOLERANCE / 2) - problem.fixed[limit.quantity]
            self._add(problem.values[limit.quantity], bound, _STEPS.get(limit.quantity))

    def limit(self, values: Array, bound: float) -> None:
        """Let the sum of values be no more than a bound that some choice has."""
        self._add(values, bound * (1 + _TOLERANCE))

    def _add(self, values: Array, bound: float, steps: float | None = None) -> None:
        units = range(len(self.problem.units))
        least = np.array([values[c].min() for c in map(self.problem.choices, units)])
        above, left = values - least[self.problem.unit_of], bound - float(least.sum())
        self.allowed = self.allowed & (above <= left)
        above = np.where(self.allowed, above, 0.0)
        if steps is not None:
            whole = np.round(above * steps).astype(np.int64)
            common = max(int(np.gcd.reduce(whole)), 1)
            above, left = (whole // common).astype(float), float(np.floor(left * steps / common))
        if left > 0:
            scale = _SCALE / left if steps is None else min(1.0, _SCALE**2 / left)
            self.bounds.append((scale * above, scale * left))

    def least(self, minimize: Array) -> Array | None:
        """Return the choice of least sum, ``None`` without any.

        What alone is above a sum that was found is left out, and the rest searched again, until
        the sum is not small beside its parts: the solver's gap is one of the largest part.
        """
        allowed, best, value = self.allowed, None, np.inf
        while (found := self._solved(minimize, allowed)) is not None:
            before, now = value, float(minimize[found].sum())
            if now >= before:
                return best
            best, value = found, now
            largest = float(minimize[allowed].max())
            if value == 0 or value >= _GAP * largest:
                return best
            allowed = allowed & (minimize <= value)
        return best

    def _solved(self, minimize: Array, allowed: Array) -> Array | None:
        units = range(len(self.problem.units))
        if not all(allowed[c].any() for c in map(self.problem.choices, units)):
            return None
        largest = float(minimize[allowed].max())
        objective = np.where(allowed, minimize, 0.0) * (_SCALE / largest if largest else 0.0)
        tried = 0
        while True:
            found = milp(
                objective,
                integrality=np.ones(len(objective)),
                bounds=Bounds(0, allowed.astype(float)),
                constraints=self._constraints(tried // _TRIES),
                options={"mip_rel_gap": 0.0},
            )
            if found.x is None:
                return None
            chosen = np.array([c[found.x[c].argmax()] for c in map(self.problem.choices, units)])
            if keeps_to(self.problem, chosen, self.limits):
                return chosen
            self.rows.append(_without(self.problem, chosen))  # the solver's tolerance let it pass
            tried += 1

    def _constraints(self, hairs: int) -> list[LinearConstraint]:
        """Return all constraints, with bounds lowered by so many times the solver's tolerance."""
        return [
            *self.rows,
            *(LinearConstraint(a[None], ub=b * (1 - hairs * 1e-6)) for a, b in self.bounds),
        ]


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
