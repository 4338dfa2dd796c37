"""The largest magnitude as the range."""

from __future__ import annotations

from torch import Tensor

from lq.observers import RangeObserver
from lq.spec import QuantSpec


def max_amax(statistics: RangeObserver, spec: QuantSpec) -> Tensor:
    """Return the largest magnitude seen: nothing is clipped.

    ``amax = max |x|``
    """
    assert statistics.amax is not None
    return statistics.amax
