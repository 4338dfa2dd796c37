"""Sensitive, less, hardly: the units of a sweep in three classes, by what was measured."""

from __future__ import annotations

import math

from lq.messages import suggest
from lq.sensitivity.result import LayerSensitivity, Sensitivity

CLASSES = ("high", "medium", "low")
HIGH, LOW = 0.5, 0.1
"""Shares of the cost of all units: what the high ones cause together, and what the low ones do."""


def sensitivity_classes(sensitivity: Sensitivity, format: str | None = None) -> dict[str, str]:
    """Return whether each unit is ``high``, ``medium`` or ``low``, in the order of the model.

    The rule needs no threshold in the metric's units. ``high`` are the fewest units that together
    cause half of the cost of all. ``low`` are units that show no difference to float (their 95%
    interval has 0 in it), and the most units that together cause no more than a tenth.
    The others are ``medium``. Costs are the sweep's metric; of an SQNR its noise-to-signal ratio;
    a unit that makes the model better costs nothing, and one that overflows is ``high``.

    Args:
        sensitivity: What a sweep found.
        format: One of its formats; the first, if not given.

    Raises:
        ValueError: If the format was not swept, or only parts of the units were.

    Example:
        >>> costs = {"stem": 0.6, "conv": 0.35, "fc": 0.05}
        >>> rows = [LayerSensitivity(layer=k, format="int8", kl=v) for k, v in costs.items()]
        >>> found = Sensitivity(found=rows, units={k: (k,) for k in costs}, formats=("int8",),
        ...                     method="exact", metric="kl", n=64)
        >>> sensitivity_classes(found)
        {'stem': 'high', 'conv': 'medium', 'fc': 'low'}
    """
    check_whole(sensitivity)
    if format is not None and format not in sensitivity.formats:
        raise ValueError(
            f"Expected a format of the sweep, but got {format!r}; "
            f"{suggest(format, sensitivity.formats)}"
        )
    costs = {r.layer: _cost(r, sensitivity.metric) for r in sensitivity.ranked(format)}
    noise = {r.layer for r in sensitivity.ranked(format) if r.noise}
    total = sum(cost for cost in costs.values() if math.isfinite(cost))
    classes, before = {}, 0.0
    for unit, cost in costs.items():
        if not math.isfinite(cost):
            classes[unit] = "high"  # it overflows
            continue
        if unit in noise or total - before <= LOW * total:
            classes[unit] = "low"
        else:
            classes[unit] = "high" if before < HIGH * total else "medium"
        before += cost
    return {unit: classes[unit] for unit in sensitivity.units if unit in classes}


def check_whole(sensitivity: Sensitivity) -> None:
    """Raise a ``ValueError`` for a sweep that took weights and inputs apart, and never both."""
    parts = {row.part for row in sensitivity}
    if "both" not in parts:
        raise ValueError(
            f"Expected a sweep of both parts of the units, but got {', '.join(sorted(parts))} "
            "alone; sweep them with parts=['both']."
        )


def _cost(row: LayerSensitivity, metric: str) -> float:
    return max(row.cost(metric), 0.0)
