"""From the values of samples to the rows of a result."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from lq.sensitivity.comparing import is_noise, measures
from lq.sensitivity.exact import Variant
from lq.sensitivity.journal import FLOAT, Journal
from lq.sensitivity.measures import Measures
from lq.sensitivity.result import LayerSensitivity

Assembled = tuple[list[LayerSensitivity], dict[str, Measures], int, float]


def assemble(until: Mapping[Variant, int], journal: Journal, metric: str) -> Assembled:
    """Return the rows of all units, the measures of whole formats, samples, and float top-1.

    Args:
        until: Variant -> the last batch of it that counts.
        journal: The values of samples.
        metric: What units are ranked by.
    """
    floats = journal.values(FLOAT, max(until.values()))
    found: dict[Variant, Measures] = {}
    counts = {v: len(journal.values(v.key, last)) for v, last in until.items()}
    for n in sorted({*counts.values()}):
        values = {v.key: journal.values(v.key, until[v]) for v in until if counts[v] == n}
        by_key = measures(values, floats[:n, -1].astype(np.float64))
        found |= {v: by_key[v.key] for v in until if counts[v] == n}
    rows = [
        _row(v, found[v], found.get(dataclasses.replace(v, left_float=True)), counts[v], metric)
        for v in until
        if v.unit and not v.left_float
    ]
    whole = {v.format: found[v] for v in until if not v.unit}
    return rows, whole, len(floats), float(floats[:, 0].mean(dtype=np.float64))


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
