"""How far a changed model is from the float one: what is measured, and how it is said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from lq.messages import suggest

METRICS = {
    "top1": "top1_drop",
    "top5": "top5_drop",
    "loss": "loss_increase",
    "kl": "kl",
    "sqnr": "sqnr_db",
}
"""Names of metrics, and the attribute of ``Measures`` that each is."""
SIGNED = ("top1", "top5", "loss")
"""Metrics that a change may also make better."""
PARTS = ("both", "weights", "inputs")
"""What of a layer is quantized."""


@dataclass(frozen=True, kw_only=True)
class Measures:
    """How far a changed model is from the float one, on the same samples.

    What could not be measured is NaN: the first three, where batches have no class numbers.

    Attributes:
        top1_drop: Top-1 of the float model less that of the changed one, as a fraction.
        top5_drop: The same for top-5.
        loss_increase: Cross-entropy of the changed model less that of the float one, in nats.
        kl: ``KL(float || changed)`` of the outputs' softmax, in nats.
        sqnr_db: ``10 log10(sum(float^2) / sum((float - changed)^2))`` of the outputs.
        intervals: Metric -> lower and upper end of its 95% bootstrap interval.
    """

    top1_drop: float = math.nan
    top5_drop: float = math.nan
    loss_increase: float = math.nan
    kl: float = math.nan
    sqnr_db: float = math.nan
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def value(self, metric: str) -> float:
        """Return one measure by the name of its metric."""
        check_metric(metric)
        return float(getattr(self, METRICS[metric]))

    def cost(self, metric: str) -> float:
        """Return one measure as a cost that adds up over units: of the SQNR, its ``noise/signal``.

        Example:
            >>> Measures(sqnr_db=20.0).cost("sqnr")
            0.01
        """
        value = self.value(metric)
        return math.pow(10, -value / 10) if metric == "sqnr" else value


def check_metric(metric: str) -> None:
    """Raise a ``ValueError`` with the nearest spelling unless `metric` is one."""
    if metric not in METRICS:
        raise ValueError(
            f"Expected `metric` to be of {', '.join(METRICS)}, but got {metric!r}; "
            f"{suggest(metric, METRICS)}"
        )
