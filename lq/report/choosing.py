"""Which of the methods that were measured to take."""

from __future__ import annotations

from dataclasses import dataclass

from lq.comparison import Comparison, Row
from lq.comparison.speed import Setting
from lq.messages import suggest

USES = ("edge", "server", "real_time")
"""What a model is wanted for: a small file, throughput, or a short time of one sample."""
TOLERANCE = 0.01
"""Accuracy that a method may lose, with the upper end of its interval."""
SAME_SIZE = 0.02
"""Sizes that differ by less, relatively, count as one."""
_EFFORT = ("ptq", "mixed", "qat", "file")
"""Kinds of methods, the simplest first; a file is made by other means."""


def check_use(use: str) -> None:
    """Raise a ``ValueError`` for a use that is not known."""
    if use not in USES:
        raise ValueError(
            f"Expected `use` to be one of {', '.join(USES)}, but got {use!r}; {suggest(use, USES)}"
        )


@dataclass(frozen=True)
class Choice:
    """What to take.

    Attributes:
        row: The method.
        enough: Whether it is shown to lose no more than it may.
        pays: Whether it is measurably better than float at what counts for the use.
        setting: The batch size and threads that count, if anything was timed.
    """

    row: Row
    enough: bool
    pays: bool
    setting: Setting | None


def choose(comparison: Comparison, use: str) -> Choice | None:
    """Return what to take for a use, ``None`` where no method came to a file.

    Of those that lose at most a point, with the upper end of the interval, the smallest for
    ``edge``, and the fastest for the others, all within its interval counting as one; of those the
    simplest, unless another is measurably more accurate. If none is good enough, the one whose
    interval ends lowest.
    """
    rows = [row for row in comparison.deployed[1:] if row.drop is not None]
    if not rows:
        return None
    enough = [row for row in rows if row.lost.high <= TOLERANCE]
    setting = None if use == "edge" else setting_of(comparison, use)
    candidates = enough or [min(rows, key=lambda row: row.lost.high)]
    tied = _smallest(candidates) if setting is None else _fastest(candidates, setting)
    best, *others = sorted(tied, key=_effort)
    for row in others:
        if comparison.difference(best, row).low > 0:
            best = row
    return Choice(best, bool(enough), _pays(comparison, best, setting), setting)


def setting_of(comparison: Comparison, use: str) -> Setting | None:
    """Return the batch size that counts, with the threads that float is fastest with."""
    timed = comparison.rows[0].evaluation
    if timed is None or not timed.latencies:
        return None
    sizes = [latency.batch_size for latency in timed.latencies]
    size = min(sizes) if use == "real_time" else max(sizes)
    fastest = min((x for x in timed.latencies if x.batch_size == size), key=lambda x: x.p50_ms)
    return size, fastest.threads


def _pays(comparison: Comparison, row: Row, setting: Setting | None) -> bool:
    if setting is None:
        return comparison.compression(row) > 1 + SAME_SIZE
    speedup = row.speedup(setting)
    return speedup is not None and speedup.low > 1


def _smallest(rows: list[Row]) -> list[Row]:
    least = min(row.size_mb for row in rows)
    return [row for row in rows if row.size_mb <= least * (1 + SAME_SIZE)]


def _fastest(rows: list[Row], setting: Setting) -> list[Row]:
    """Return the fastest rows, those whose intervals overlap; the smallest where none is timed."""
    timed = {row.name: speedup for row in rows if (speedup := row.speedup(setting))}
    if not timed:
        return _smallest(rows)
    least = max(timed.values(), key=lambda speedup: speedup.ratio).low
    return [row for row in rows if row.name in timed and timed[row.name].high >= least]


def _effort(row: Row) -> tuple[int, bool]:
    return _EFFORT.index(row.kind), bool(row.method.get("repair"))
