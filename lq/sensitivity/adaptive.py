"""Spends batches where the ranking is still open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from lq.sensitivity.comparing import COLUMNS
from lq.sensitivity.exact import Variant
from lq.sensitivity.journal import Journal

BUDGET = 0.4
"""Largest share of the full sweep's work."""
DEVIATIONS = 3.0
"""How many standard errors of a paired difference decide."""
FEWEST = 32
"""Samples before anything is decided."""


def still_open(values: Mapping[str, np.ndarray], top: int, total: int) -> dict[str, float]:
    """Return the units that may yet get into the `top` most sensitive or fall out of them.

    A unit in them is decided when it costs more than the first one outside, and one outside when
    it costs less than the last one inside, by more than `DEVIATIONS` standard errors of the mean
    paired difference over the samples that both were measured on, ``sd / sqrt(n) sqrt(1 - n/N)``
    (the finite population that the full sweep would measure).

    Args:
        values: Unit -> cost of each sample ``[n]``, the first samples being the same.
        top: How many units are wanted.
        total: Samples of the full sweep ``N``.

    Returns:
        Unit -> how many standard errors it is away from the border, the least decided first.

    Example:
        >>> values = {"a": np.ones(64), "b": np.zeros(64), "c": np.zeros(64)}
        >>> sorted(still_open(values, 1, 1000)), sorted(still_open(values, 2, 1000))
        ([], ['b', 'c'])
    """
    if len(values) <= top:
        return {}
    ranked = sorted(values, key=lambda name: -float(values[name].mean()))
    last_in, first_out = ranked[top - 1], ranked[top]
    distances = {
        name: _distance(values[name], values[first_out], total)
        if i < top
        else _distance(values[last_in], values[name], total)
        for i, name in enumerate(ranked)
    }
    found = {name: d for name, d in distances.items() if not d > DEVIATIONS}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _distance(larger: np.ndarray, smaller: np.ndarray, total: int) -> float:
    """Return the mean difference over the samples of both, in standard errors."""
    n = min(len(larger), len(smaller))
    difference = larger[:n].astype(np.float64) - smaller[:n]
    left = math.sqrt(max(1 - n / total, 0.0))
    error = float(difference.std()) / math.sqrt(n) * left
    mean = float(difference.mean())
    if error == 0:
        return math.inf if mean > 0 or left == 0 else 0.0
    return mean / error


class Halving:
    """Chooses which variants to measure on the next batch.

    Successive halving (Jamieson and Talwalkar 2016, "Non-stochastic Best Arm Identification and
    Hyperparameter Optimization", section 3) on intervals: what is decided is measured no more; and
    at each doubling of the batches, as long as the work left is too little for all that is open,
    the half that is least decided goes on.

    Args:
        variants: All variants.
        costs: Variant -> forward passes for a batch.
        metric: What they are ranked by.
        top: How many of the most sensitive units are wanted, for each format and part; at most
            half of them.
        batches: How many batches there are.

    Attributes:
        open: What to measure next; empty when the ranking is decided or the work is spent.
        undecided: What is not decided by all that was measured.
    """

    def __init__(
        self,
        variants: Sequence[Variant],
        costs: Mapping[Variant, float],
        metric: str,
        top: int,
        batches: int,
    ) -> None:
        self.variants, self.costs, self.top, self.batches = variants, costs, top, batches
        self.column = COLUMNS.index(metric)
        self.open, self.undecided = list(variants), list(variants)
        self.budget = BUDGET * batches * self._work(variants)
        self.spent = 0.0

    def _work(self, variants: Sequence[Variant]) -> float:
        """Return the forward passes that a batch takes, the recorded one among them."""
        return 1.0 + sum(self.costs[v] for v in variants)

    def decide(self, journal: Journal, index: int) -> None:
        """Take note of a batch that was measured, and choose what goes on."""
        self.spent += self._work(self.open)
        distances = self._distances(journal, index)
        if distances is not None:
            self.undecided = sorted(distances, key=distances.__getitem__)
            self.open = [variant for variant in self.undecided if variant in self.open]
            if (index + 1) & index == 0:
                self._halve(self.batches - index - 1)
        if self.spent + self._work(self.open) > self.budget:
            self.open = []

    def _distances(self, journal: Journal, index: int) -> dict[Variant, float] | None:
        """Return how far what is not decided is from being so, ``None`` with too few samples."""
        found: dict[Variant, float] = {}
        for group in {(v.format, v.part): None for v in self.variants}:
            by_unit = {v.unit: v for v in self.variants if (v.format, v.part) == group}
            values = {u: journal.values(v.key, index)[:, self.column] for u, v in by_unit.items()}
            n = max(map(len, values.values()))
            if n < FEWEST:
                return None
            top = min(self.top, max(len(values) // 2, 1))
            still = still_open(values, top, n * self.batches // (index + 1))
            found |= {by_unit[unit]: distance for unit, distance in still.items()}
        return found

    def _halve(self, left: int) -> None:
        """Keep the half that is least decided where the work left is too little for all."""
        if self.spent + left * self._work(self.open) > self.budget:
            self.open = self.open[: (len(self.open) + 1) // 2]
