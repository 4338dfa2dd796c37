"""From statistics to ranges: pure functions, and the names they go by."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from lq.calibrators.entropy import entropy_amax
from lq.calibrators.maximum import max_amax
from lq.calibrators.mse import mse_amax
from lq.calibrators.percentile import percentile_amax
from lq.messages import suggest
from lq.observers import HistogramObserver, RangeObserver


@dataclass(frozen=True)
class Calibrator:
    """A way to choose a range: what to observe, and what to make of it.

    Attributes:
        name: Its name.
        observer: Collects what it needs.
        amax: ``(statistics, spec) -> amax``.
    """

    name: str
    observer: type[RangeObserver]
    amax: Callable[..., Tensor]


CALIBRATORS: dict[str, Calibrator] = {
    "max": Calibrator("max", RangeObserver, max_amax),
    "percentile": Calibrator("percentile", HistogramObserver, percentile_amax),
    "entropy": Calibrator("entropy", HistogramObserver, entropy_amax),
    "mse": Calibrator("mse", HistogramObserver, mse_amax),
}
"""Calibrators by name. A new one is a file and a row here."""
AUTO = "auto"
"""Asks for the best of those that compete, quantizer by quantizer."""
COMPETITORS = ("max", "percentile", "percentile(99.999)", "entropy", "mse")
NAMES = (*CALIBRATORS, "percentile(p)", AUTO)


def parse_calibrators(name: str) -> tuple[Calibrator, ...]:
    """Return the calibrators that a name asks for: one, or for ``"auto"`` all that compete.

    Names are ``"max"``, ``"percentile"`` (99.99), ``"percentile(99.9)"``, ``"entropy"``,
    ``"mse"`` and ``"auto"``.

    Raises:
        ValueError: For an unknown name or a percentile outside (0, 100].

    Example:
        >>> [c.name for c in parse_calibrators("auto")]
        ['max', 'percentile', 'percentile(99.999)', 'entropy', 'mse']
        >>> parse_calibrators("percentil")
        Traceback (most recent call last):
        ValueError: Expected `calibrator` to be one of max, percentile, entropy, mse, percentile(p),
        auto, but got 'percentil'; did you mean 'percentile'?
    """
    if name == AUTO:
        return tuple(found for rival in COMPETITORS for found in parse_calibrators(rival))
    if name in CALIBRATORS:
        return (CALIBRATORS[name],)
    match = re.fullmatch(r"percentile\((\d+\.?\d*)\)", str(name))
    if match:
        return (_percentile(name, float(match[1])),)
    raise ValueError(
        f"Expected `calibrator` to be one of {', '.join(NAMES)}, but got {name!r}; "
        f"{suggest(name, NAMES)}"
    )


def _percentile(name: str, percentile: float) -> Calibrator:
    if not 0 < percentile <= 100:
        raise ValueError(f"Expected a percentile in (0, 100], but got {name!r}.")
    amax = partial(percentile_amax, percentile=percentile)
    return Calibrator(name, HistogramObserver, amax)
