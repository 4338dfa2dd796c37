"""What to try next, given what was measured of the plans tried so far."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from lq.costs import Costs
from lq.mixed_precision.constraints import PrecisionConstraints, UnreachableError, keeps_to
from lq.mixed_precision.problem import build_problem
from lq.mixed_precision.searching import SearchedPlan, solve, to_minimize
from lq.paired import Drop
from lq.sensitivity import Sensitivity

TRIALS = 8
"""Plans to measure before giving up."""


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

    def values(self) -> dict[str, float]:
        """Return what counts against limits: what was measured, and what can only be counted."""
        values = {**dataclasses.asdict(self.plan.predicted), "drop": self.drop.high}
        return values if self.latency_ms is None else {**values, "latency_ms": self.latency_ms}

    def __str__(self) -> str:
        measured = str(self.drop)
        if self.latency_ms is not None:
            measured += f", {self.latency_ms:.2f} ms"
        end = "kept" if self.kept else "refused"
        return f"{self.plan}: predicted {self.plan.predicted}; measured {measured}; {end}"


class SearchLoop:
    """Searches plans, learning from what is measured of them.

    Args:
        sensitivity: What ``lq.sweep`` found.
        constraints: The limits.
        costs: What layers cost.
        minimize: As for ``search``.
    """

    def __init__(
        self,
        sensitivity: Sensitivity,
        constraints: PrecisionConstraints,
        costs: Costs,
        minimize: str | None,
    ) -> None:
        self.sensitivity, self.constraints, self.costs = sensitivity, constraints, costs
        self.limits = constraints.limits(costs)
        self.minimize = minimize or to_minimize(self.limits)
        self.corrections: dict[tuple[str, str], float] = {}
        self.more_ms = 0.0
        self.trials: list[Trial] = []

    @property
    def timed_by(self) -> str | None:
        """The engine whose latency is limited, if one's is."""
        timed = any(limit.quantity == "latency_ms" for limit in self.limits)
        return self.costs.engine if timed else None

    @property
    def kept(self) -> Trial | None:
        """The best plan so far that keeps to the limits."""
        found = [trial for trial in self.trials if trial.kept]
        return min(found, key=lambda trial: self._minimized(trial.plan), default=None)

    def next_plan(self) -> SearchedPlan | None:
        """Return what to try next, ``None`` where nothing better is to be expected.

        Raises:
            UnreachableError: If no plan keeps to the limits, by predictions alone.
        """
        score, kept = self.minimize == "score", self.kept
        if len(self.trials) >= TRIALS or (score and kept is not None):
            return None
        try:
            plan = self._search(score)
        except UnreachableError:
            if not self.trials:
                raise
            if not self.more_ms:
                return None
            self.more_ms = 0.0  # what one plan took beyond its prediction another may not
            return self.next_plan()
        cheaper = kept is None or self._minimized(plan) < self._minimized(kept.plan)
        return plan if cheaper else None

    def _search(self, score: bool) -> SearchedPlan:
        problem = build_problem(self.sensitivity, self.constraints, self.costs, self.corrections)
        if "latency_ms" in problem.fixed:
            problem.fixed["latency_ms"] += self.more_ms
        # Where the drop itself is minimized its limit is for the measurement alone.
        limits = [limit for limit in self.limits if not (score and limit.quantity == "drop")]
        tried = [trial.plan for trial in self.trials]
        return solve(problem, limits, self.sensitivity, self.costs, self.minimize, tried)

    def _minimized(self, plan: SearchedPlan) -> float:
        return float(getattr(plan.predicted, self.minimize))

    def judge(self, plan: SearchedPlan, drop: Drop, latency_ms: float | None) -> Trial:
        """Take note of what was measured of a plan."""
        trial = Trial(plan, drop, latency_ms, kept=False)
        trial = dataclasses.replace(trial, kept=keeps_to(self.limits, trial.values()))
        self.more_ms += max((latency_ms or 0.0) - (plan.predicted.latency_ms or 0.0), 0.0)
        self._learn(plan, drop.high - plan.predicted.drop)
        self.trials.append(trial)
        return trial

    def _learn(self, plan: SearchedPlan, unforeseen: float) -> None:
        """Add what a plan lost beyond its prediction to the choices that it is made of."""
        chosen = [pair for pair in plan.units.items() if pair[1] != "fp32"]
        kl = [self.sensitivity.row(*pair).kl for pair in chosen]
        parts = [x if 0 < x < math.inf else 0.0 for x in kl]
        for pair, part in zip(chosen, parts, strict=True):
            share = part / sum(parts) if sum(parts) > 0 else 1 / len(chosen)
            self.corrections[pair] = self.corrections.get(pair, 0.0) + unforeseen * share

    def _excess(self, trial: Trial) -> float:
        """Return by how much a plan breaks its limits, each in parts of its bound."""
        values = trial.values()
        return sum(max(values[x.quantity] / x.bound - 1, 0.0) for x in self.limits)

    @property
    def nearest(self) -> Trial:
        """The plan that came nearest to the limits, of those that were measured."""
        return min(self.trials, key=self._excess)

    def failed(self) -> UnreachableError:
        """Return the error that says which limit no plan kept, and how near one came."""
        best = self.nearest
        values = best.values()
        broken = next(limit for limit in self.limits if not keeps_to([limit], values))
        beside = ", ".join(f"{x.name}={x.given:g}" for x in self.limits if x is not broken)
        return UnreachableError(
            f"Expected `{broken.name}` to be reachable{' beside ' * bool(beside)}{beside}, but got "
            f"{broken.given:g}; the nearest of {len(self.trials)} plans that were measured is "
            f"{broken.nearest(values[broken.quantity]):.4g} ({best.drop})."
        )
