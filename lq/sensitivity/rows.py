"""From the values of samples to the rows of a result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lq.sensitivity.comparing import is_noise, measures
from lq.sensitivity.exact import Variant
from lq.sensitivity.journal import FLOAT, Journal
from lq.sensitivity.measures import Measures
from lq.sensitivity.result import LayerSensitivity

Assembled = tuple[list[LayerSensitivity], dict[str, Measures], int, float]


def assemble(variants: Sequence[Variant], journal: Journal, metric: str) -> Assembled:
    """Return the rows of all units, the measures of whole formats, samples, and float top-1."""
    floats = journal.values(FLOAT)
    found: dict[Variant, Measures] = {}
    counts = {v: len(journal.values(v.key)) for v in variants}
    for n in sorted({*counts.values()} - {0}):
        values = {v.key: journal.values(v.key) for v in variants if counts[v] == n}
        by_key = measures(values, floats[:n, -1].astype(np.float64))
        found |= {v: by_key[v.key] for v in variants if counts[v] == n}
    rows = [
        _row(v, found[v], found.get(dataclasses.replace(v, left_float=True)), counts[v], metric)
        for v in variants
        if v.unit and not v.left_float
    ]
    whole = {v.format: found[v] for v in variants if not v.unit}
    top1 = float(floats[:, 0].mean(dtype=np.float64)) if len(floats) else math.nan
    return rows, whole, len(floats), top1


def _row(
    variant: Variant, found: Measures, left: Measures | None, n: int, metric: str
) -> LayerSensitivity:
    low, high = found.intervals.get(metric, (math.nan, math.nan))
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return LayerSensitivity(
        layer=variant.unit,
        format=variant.format,
        part=variant.part,
        n=n,
        low=low,
        high=high,
        noise=is_noise(found, metric),
        left_float=left,
        **values,
    )
