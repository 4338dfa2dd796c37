"""Sensitivities as plain values for JSON and CSV, and back."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from lq.sensitivity.measures import Measures

MeasuresT = TypeVar("MeasuresT", bound=Measures)


def to_plain(value: Any) -> Any:
    """Return values as strict JSON has them: numbers that are not finite as text.

    Example:
        >>> to_plain({"kl": math.inf, "units": ("a", "b")})
        {'kl': 'inf', 'units': ['a', 'b']}
    """
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {key: to_plain(v) for key, v in value.items()}
    return [to_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def measures_from(values: Mapping[str, Any], cls: type[MeasuresT]) -> MeasuresT:
    """Return the measures that plain values describe."""
    kept: dict[str, Any] = {
        f.name: float(values[f.name]) if f.type == "float" else values[f.name]
        for f in dataclasses.fields(cls)
    }
    kept["intervals"] = {
        m: (float(low), float(high)) for m, (low, high) in kept["intervals"].items()
    }
    if kept.get("left_float") is not None:
        kept["left_float"] = measures_from(kept["left_float"], Measures)
    return cls(**kept)


def csv_line(row: Measures) -> dict[str, Any]:
    """Return a row of a table: the measures, the ends of their intervals, those of the rest."""
    line = dataclasses.asdict(row)
    left = line.pop("left_float", None) or {}
    intervals = line.pop("intervals")
    ends = {f"{m}_{end}": v for m, pair in intervals.items() for end, v in _ends(pair)}
    others = {f"left_float_{k}": v for k, v in left.items() if k != "intervals"}
    first = {name: line.pop(name) for name in ("layer", "format", "part", "n")}
    return first | line | ends | others


def _ends(pair: tuple[float, float]) -> tuple[tuple[str, float], ...]:
    return ("low", pair[0]), ("high", pair[1])
