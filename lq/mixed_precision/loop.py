"""What to try next, given what was measured of the plans tried so far."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from lq.costs import Costs
from lq.mixed_precision.constraints import PrecisionConstraints, keeps_to
from lq.mixed_precision.measured import Drop
from lq.mixed_precision.problem import build_problem
from lq.mixed_precision.search import SearchedPlan, solve, to_minimize
from lq.sensitivity import Sensitivity


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
        self.failure = ValueError("Expected a plan that keeps to the limits.")

    @property
    def timed_by(self) -> str | None:
        """The engine whose latency is limited, if one's is."""
        timed = any(limit.quantity == "latency_ms" for limit in self.limits)
        return self.costs.engine if timed else None

    def next_plan(self) -> SearchedPlan:
        """Return the best plan that was not measured yet."""
        problem = build_problem(self.sensitivity, self.constraints, self.costs, self.corrections)
        if "latency_ms" in problem.fixed:
            problem.fixed["latency_ms"] += self.more_ms
        # Where the drop itself is minimized its limit is for the measurement alone.
        score = self.minimize == "score"
        limits = [limit for limit in self.limits if not (score and limit.quantity == "drop")]
        tried = [trial.plan for trial in self.trials]
        return solve(problem, limits, self.sensitivity, self.costs, self.minimize, tried)

    def is_cheaper(self, plan: SearchedPlan, best: SearchedPlan) -> bool:
        """Return whether a plan has less of what is minimized."""
        return bool(getattr(plan.predicted, self.minimize) < getattr(best.predicted, self.minimize))

    def judge(self, plan: SearchedPlan, drop: Drop, latency_ms: float | None) -> Trial:
        """Take note of what was measured of a plan."""
        measured = {**dataclasses.asdict(plan.predicted), "drop": drop.high}
        if latency_ms is not None:
            measured["latency_ms"] = latency_ms
            self.more_ms += max(latency_ms - measured["latency_ms"], 0.0)
        self._learn(plan, drop.high - plan.predicted.drop)
        self.trials.append(Trial(plan, drop, latency_ms, keeps_to(self.limits, measured)))
        return self.trials[-1]

    def _learn(self, plan: SearchedPlan, unforeseen: float) -> None:
        """Add what a plan lost beyond its prediction to the choices that it is made of."""
        chosen = [pair for pair in plan.units.items() if pair[1] != "fp32"]
        kl = [self.sensitivity.row(*pair).kl for pair in chosen]
        parts = [x if x > 0 else 0.0 for x in kl]
        for pair, part in zip(chosen, parts, strict=True):
            share = part / sum(parts) if sum(parts) > 0 else 1 / len(chosen)
            self.corrections[pair] = self.corrections.get(pair, 0.0) + unforeseen * share

    def failed(self) -> ValueError:
        """Return the error that says what was reached."""
        if not self.trials:
            return self.failure
        best = min(self.trials, key=lambda trial: trial.drop.high)
        return ValueError(
            f"{str(self.failure).rstrip('.')}; the best of {len(self.trials)} plans that were "
            f"measured has a {best.drop}, predicted {best.plan.predicted}."
        )
