"""What to do next, each sentence with the measurements that it rests on."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lq.comparison import Comparison, Row, Speedup
from lq.messages import suggest
from lq.paired import Drop

USES = ("edge", "server", "real_time")
"""What a model is wanted for: a small file, throughput, or a short time of one sample."""
TOLERANCE = 0.01
"""Accuracy that a method may lose, with the upper end of its interval."""
SAME_SIZE = 0.02
"""Sizes that differ by less, relatively, count as one."""
SHARE = 0.25
"""A layer with this share of all layers' costs is worth leaving float."""


def check_use(use: str) -> None:
    """Raise a ``ValueError`` for a use that is not known."""
    if use not in USES:
        raise ValueError(
            f"Expected `use` to be one of {', '.join(USES)}, but got {use!r}; {suggest(use, USES)}"
        )


def recommend(comparison: Comparison, use: str = "server") -> list[str]:
    """Return which method to take and why, and what to do next, from what was measured.

    A method is good enough if the upper end of its drop's interval is at most one point. Of those
    the smallest is taken for ``edge``, the fastest at the largest batch for ``server``, and at the
    smallest for ``real_time``; where several are as good, the one that took least time to make,
    unless another is measurably more accurate.

    Args:
        comparison: What ``lq.compare`` found.
        use: ``edge``, ``server`` or ``real_time``.

    Raises:
        ValueError: For another use.
    """
    check_use(use)
    rows = [row for row in comparison.measured[1:] if _drop(row) is not None]
    if not rows:
        return []
    enough = [row for row in rows if _lost(row).high <= TOLERANCE]
    best = _best(comparison, enough or [min(rows, key=lambda row: _lost(row).high)], use)
    return [
        _choice(comparison, best, use, bool(enough)),
        *_others(comparison, best, rows),
        *_noise(comparison, rows),
        *_speed(comparison, rows),
        *_calibration(comparison),
        *_layers(comparison, rows),
        *_next(rows),
        *_training(rows),
    ]


def _best(comparison: Comparison, rows: list[Row], use: str) -> Row:
    tied = _smallest(rows) if use == "edge" else _fastest(rows, largest=use == "server")
    best, *others = sorted(tied, key=lambda row: row.seconds)
    for row in others:
        if comparison.difference(best, row).low > 0:
            best = row
    return best


def _smallest(rows: list[Row]) -> list[Row]:
    least = min(_size(row) for row in rows)
    return [row for row in rows if _size(row) <= least * (1 + SAME_SIZE)]


def _fastest(rows: list[Row], largest: bool) -> list[Row]:
    """Return the fastest rows, those whose intervals overlap; the smallest where none is timed."""
    timed = {row.name: _speedup(row, largest) for row in rows if row.speedups}
    if not timed:
        return _smallest(rows)
    least = max(timed.values(), key=lambda speedup: speedup.ratio).low
    return [row for row in rows if row.name in timed and timed[row.name].high >= least]


def _choice(comparison: Comparison, best: Row, use: str, enough: bool) -> str:
    float_row = comparison.measured[0].evaluation
    assert float_row is not None
    told = (
        f"{_points(_lost(best))} of float's {float_row.top1:.2%} on {comparison.n} samples, its "
        f"file is {comparison.compression(best):.2f} times as small ({_size(best):.3f} MB)"
    )
    if best.speedups:
        found = _speedup(best, largest=use != "real_time")
        told += f", and it is {_times(found)}"
    if enough:
        return f"For {use.replace('_', ' ')} take {best.name}: it loses {told}."
    return (
        f"No method is shown to lose at most {100 * TOLERANCE:g} point; the nearest is "
        f"{best.name}: it loses {told}."
    )


def _others(comparison: Comparison, best: Row, rows: list[Row]) -> Iterator[str]:
    """Yield which methods are as accurate as the best, and which are measurably worse."""
    found = {row.name: comparison.difference(row, best) for row in rows if row is not best}
    same = {name: drop for name, drop in found.items() if drop.low <= 0 <= drop.high}
    if same:
        most = max(abs(drop.mean) for drop in same.values())
        yield (
            f"Within the noise of {comparison.n} samples as accurate as {best.name}: "
            f"{', '.join(same)} (differences of at most {100 * most:.2f} points, each interval "
            "with 0 in it)."
        )
    worse = sorted((drop.mean, name) for name, drop in found.items() if drop.low > 0)
    for _, name in worse[::-1][:3]:
        yield f"{name} is measurably less accurate than {best.name}, by {_points(found[name])}."
    better = sorted((drop.mean, name) for name, drop in found.items() if drop.high < 0)
    for _, name in better[:3]:
        back = comparison.difference(best, comparison[name])
        yield f"{name} is measurably more accurate than {best.name}, by {_points(back)}."


def _noise(comparison: Comparison, rows: list[Row]) -> Iterator[str]:
    unclear = [row for row in rows if _lost(row).low <= 0 <= _lost(row).high]
    if unclear:
        widest = max(_lost(row).high - _lost(row).low for row in unclear) / 2
        yield (
            f"{len(unclear)} of {len(rows)} methods show no difference to float on "
            f"{comparison.n} samples, whose intervals reach {100 * widest:.2f} points to each side "
            "at most; only more test samples can tell more."
        )


def _speed(comparison: Comparison, rows: list[Row]) -> Iterator[str]:
    """Yield where integers are slower than 16 bits or float, or how much faster."""
    integers = [row for row in rows if row.is_integer and row.speedups]
    halves = [row for row in rows if row.plan and not row.is_integer and row.speedups]
    if not integers:
        return
    for i, setting in enumerate(integers[0].speedups):
        timed = [(row.speedups[i], row) for row in integers if len(row.speedups) > i]
        found, row = max(timed, key=lambda pair: pair[0].ratio)
        rivals = [(half.speedups[i], half) for half in halves if len(half.speedups) > i]
        half, other = max(rivals, key=lambda pair: pair[0].ratio, default=(None, None))
        beside = f"; {other.name} is {half.ratio:.2f}x" if half is not None and other else ""
        if found.high < 1:
            yield (
                f"INT8 is slower than float on {comparison.hardware}: the fastest, {row.name}, is "
                f"{_times(found)}{beside}. Try another engine or larger batches."
            )
        elif half is not None and other is not None and found.high < half.low:
            yield (
                f"INT8 is slower than 16 bits on {comparison.hardware} for {_samples(setting)}: "
                f"{row.name} is {found}, {other.name} {half}. Take {other.name} unless size counts."
            )
        elif found.low > 1:
            yield (
                f"INT8 is faster than float for {_samples(setting)}: {row.name} is {found}{beside}."
            )
        else:
            yield (
                f"For {_samples(setting)} INT8 is no faster than float within noise: {row.name} is "
                f"{found}{beside}."
            )


def _calibration(comparison: Comparison) -> Iterator[str]:
    found = comparison.explanation.calibration
    if found is None:
        return
    if found.enough is None:
        yield f"Calibration with {found.samples} samples: {_lower(found.verdict)}"
    elif found.enough < found.samples:
        yield f"Of {found.samples} calibration samples {_lower(found.verdict)}"


def _layers(comparison: Comparison, rows: list[Row]) -> Iterator[str]:
    """Yield which layer to leave float, where all of them in integers measurably cost accuracy."""
    found = comparison.sensitivity
    whole = [r for r in rows if r.kind == "ptq" and r.plan and "fp32" not in r.plan.values()]
    lossy = [row for row in whole if row.is_integer and _lost(row).low > 0]
    if found is None or not lossy or any(row.is_integer and row not in lossy for row in whole):
        return
    ranked = found.ranked()
    costs = [max(row.cost(found.metric), 0.0) for row in ranked]
    worst, total = ranked[0], sum(costs)
    if worst.noise or not total or not math.isfinite(total) or costs[0] < SHARE * total:
        return
    bytes_more = sum(
        comparison.costs.of("size_mb", layer, "fp32")
        - comparison.costs.of("size_mb", layer, worst.format)
        for layer in found.units[worst.layer]
    )
    best = min(lossy, key=lambda row: _lost(row).mean)
    yield (
        f"Leave {worst.layer} float first: alone in {worst.format} it has {costs[0] / total:.0%} "
        f"of all {len(ranked)} units' {found.metric} ({costs[0]:.3g}, {found.n} samples), for "
        f"{bytes_more:.3f} MB more; with all in integers the best, {best.name}, loses "
        f"{_points(_lost(best))}."
    )


def _next(rows: list[Row]) -> Iterator[str]:
    """Yield what was not tried, where what was tried measurably loses accuracy."""
    ptq = [row for row in rows if row.kind == "ptq" and row.is_integer]
    if not ptq:
        return
    best = min(ptq, key=lambda row: _lost(row).mean)
    if _lost(best).low <= 0:
        return
    lost = f"the best that was only calibrated, {best.name}, loses {_points(_lost(best))}"
    kinds = {row.kind for row in rows}
    if not any(row.method.get("repair") for row in ptq):
        yield f"Try repair, which takes no training: {lost}."
    elif "mixed" not in kinds:
        yield f"Try mixed precision: {lost}."
    elif "qat" not in kinds:
        yield f"Try QAT: {lost}."


def _training(rows: list[Row]) -> Iterator[str]:
    """Yield which training was still getting better when it ended."""
    for row in rows:
        scores = [line["val/top1"] for line in row.history if "val/top1" in line]
        if len(scores) > 1 and scores[-1] > max(scores[:-1]):
            yield (
                f"{row.name} was still getting better when it ended: validation top-1 rose from "
                f"{max(scores[:-1]):.2%} to {scores[-1]:.2%} in epoch {len(scores)}; train longer."
            )


def _drop(row: Row) -> Drop | None:
    found = row.evaluation
    return None if found is None or found.versus is None else found.versus.drop


def _lost(row: Row) -> Drop:
    drop = _drop(row)
    assert drop is not None
    return drop


def _size(row: Row) -> float:
    assert row.evaluation is not None
    return row.evaluation.size_mb


def _speedup(row: Row, largest: bool) -> Speedup:
    """Return the speed-up at the largest batch, or at the smallest."""
    ordered = sorted(row.speedups, key=lambda speedup: speedup.batch_size)
    return ordered[-1 if largest else 0]


def _points(drop: Drop) -> str:
    return f"{100 * drop.mean:.2f} points (95%: {100 * drop.low:+.2f} .. {100 * drop.high:+.2f})"


def _times(speedup: Speedup) -> str:
    return (
        f"{speedup.ratio:.2f} times as fast for {_samples(speedup)} "
        f"(95%: {speedup.low:.2f} .. {speedup.high:.2f})"
    )


def _samples(speedup: Speedup) -> str:
    size, threads = speedup.batch_size, speedup.threads
    count = f" on {threads} thread{'s' * (threads != 1)}" if threads else ""
    return f"{size} sample{'s' * (size != 1)} at a time{count}"


def _lower(text: str) -> str:
    return text[0].lower() + text[1:]
