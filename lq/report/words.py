"""Measurements as words."""

from __future__ import annotations

from lq.comparison import Speedup
from lq.paired import Drop


def points(drop: Drop) -> str:
    """Return what is lost, in points.

    Example:
        >>> points(Drop(0.012, 0.004, 0.02, 0.9, 500))
        '1.20 points (95%: +0.40 .. +2.00)'
    """
    return f"{100 * drop.mean:.2f} points (95%: {100 * drop.low:+.2f} .. {100 * drop.high:+.2f})"


def loses(drop: Drop) -> str:
    """Return what is lost, or gained, with its verb.

    Example:
        >>> loses(Drop(-0.01, -0.02, 0.004, 0.9, 500))
        'gains 1.00 points (95%: -0.40 .. +2.00)'
    """
    if drop.mean >= 0:
        return f"loses {points(drop)}"
    return f"gains {points(Drop(-drop.mean, -drop.high, -drop.low, drop.top1, drop.n))}"


def times(speedup: Speedup) -> str:
    """Return how fast something is, for what, with the interval.

    Example:
        >>> times(Speedup(16, 1, 1.5, 1.4, 1.6))
        '1.50 times as fast for 16 samples at a time on 1 thread (95%: 1.40 .. 1.60)'
    """
    return (
        f"{speedup.ratio:.2f} times as fast for {samples(speedup)} "
        f"(95%: {speedup.low:.2f} .. {speedup.high:.2f})"
    )


def samples(speedup: Speedup) -> str:
    """Return the setting that a speed-up is of."""
    size, threads = speedup.batch_size, speedup.threads
    count = f" on {threads} thread{'s' * (threads != 1)}" if threads else ""
    return f"{size} sample{'s' * (size != 1)} at a time{count}"
