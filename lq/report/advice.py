"""What to do next, each sentence with the measurements that it rests on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from lq.comparison import Comparison, Row, Speedup
from lq.comparison.speed import Setting
from lq.report.choosing import TOLERANCE, Choice, check_use, choose
from lq.report.words import loses, points, times

SHARE = 0.25
"""A layer with this share of all layers' costs is worth leaving float."""
FALLING = 0.1
"""A training loss that still falls by this share in the last epoch has not settled."""


def recommend(comparison: Comparison, use: str = "server") -> list[str]:
    """Return which method to take and why, and what to do next, from what was measured.

    A rule that has nothing to rest on says nothing.

    Args:
        comparison: What ``lq.compare`` found.
        use: ``edge`` (size), ``server`` (throughput) or ``real_time`` (time of one sample).

    Raises:
        ValueError: For another use.
    """
    check_use(use)
    choice = choose(comparison, use)
    rows = [row for row in comparison.measured[1:] if row.drop is not None]
    if choice is None:
        return []
    return [
        _chosen(comparison, choice, use),
        *_others(comparison, choice.row, rows),
        *_noise(comparison, rows),
        *_speed(comparison, rows),
        *_calibration(comparison),
        *_layers(comparison, rows),
        *(() if choice.enough else _next(rows)),
        *_training(rows),
    ]


def _chosen(comparison: Comparison, choice: Choice, use: str) -> str:
    row, aim = choice.row, use.replace("_", " ")
    float_row = comparison.rows[0].evaluation
    assert float_row is not None
    told = (
        f"{loses(row.lost)} of float's {float_row.top1:.2%} on {comparison.n} samples, its file is "
        f"{comparison.compression(row):.2f} times as small ({row.size_mb:.3f} MB)"
    )
    if choice.setting is not None and (found := row.speedup(choice.setting)):
        told += f", and it is {times(found)}"
    if not choice.enough:
        return (
            f"No method is shown to lose at most {100 * TOLERANCE:g} point; the nearest is "
            f"{row.name}: it {told}."
        )
    if not choice.pays:
        what = "faster" if choice.setting is not None else "smaller"
        return f"For {aim} keep float: the best, {row.name}, is not measurably {what}. It {told}."
    return f"For {aim} take {row.name}: it {told}."


def _others(comparison: Comparison, best: Row, rows: list[Row]) -> Iterator[str]:
    """Yield which methods are as accurate as the best, and which are measurably worse."""
    found = {row.name: comparison.difference(row, best) for row in rows if row is not best}
    same = {name: drop for name, drop in found.items() if drop.low <= 0 <= drop.high}
    if same:
        most = max(abs(drop.mean) for drop in same.values())
        yield (
            f"As accurate as {best.name} within the noise of {comparison.n} samples: "
            f"{', '.join(same)} (differences of at most {100 * most:.2f} points, each interval "
            "with 0 in it)."
        )
    worse = sorted((drop.mean, name) for name, drop in found.items() if drop.low > 0)
    for _, name in worse[::-1][:3]:
        yield f"{name} is measurably less accurate than {best.name}, by {points(found[name])}."
    better = sorted((drop.mean, name) for name, drop in found.items() if drop.high < 0)
    for _, name in better[:3]:
        back = comparison.difference(best, comparison[name])
        yield f"{name} is measurably more accurate than {best.name}, by {points(back)}."


def _noise(comparison: Comparison, rows: list[Row]) -> Iterator[str]:
    unclear = [row for row in rows if row.lost.low <= 0 <= row.lost.high]
    if unclear:
        widest = max(row.lost.high - row.lost.low for row in unclear) / 2
        yield (
            f"With {comparison.n} samples {len(unclear)} of {len(rows)} methods cannot be told "
            f"from float: intervals reach up to {100 * widest:.2f} points to each side, and only "
            "more test samples narrow them."
        )


def _speed(comparison: Comparison, rows: list[Row]) -> Iterator[str]:
    """Yield where int8 is slower than 16 bits or float, or how much faster."""
    for setting in comparison.settings:
        row, found = _fastest([row for row in rows if _mostly(row) == "int8"], setting)
        other, half = _fastest([r for r in rows if _mostly(r) in ("fp16", "bf16")], setting)
        if row is not None and found is not None:
            beside = f"; in 16 bits {other.name} is {half.ratio:.2f}x" if other and half else ""
            told = f"the fastest, {row.name}, is {times(found)}{beside}"
            if found.high < 1:
                yield f"INT8 is slower than float on {comparison.hardware}: {told}."
            elif half and found.high < half.low:
                yield f"INT8 is slower than 16 bits on {comparison.hardware}: {told}."
            elif found.low > 1:
                yield f"INT8 is faster than float: {told}."
            else:
                yield f"INT8 is no faster than float within noise: {told}."


def _mostly(row: Row) -> str:
    """Return the format that most of the layers have that are not float."""
    formats = Counter(format for format in row.plan.values() if format != "fp32")
    return formats.most_common(1)[0][0] if formats else ""


def _fastest(rows: list[Row], setting: Setting) -> tuple[Row | None, Speedup | None]:
    timed = [(row, speedup) for row in rows if (speedup := row.speedup(setting))]
    return max(timed, key=lambda pair: pair[1].ratio, default=(None, None))


def _calibration(comparison: Comparison) -> Iterator[str]:
    found = comparison.explanation.calibration
    if found is not None:
        verdict = found.verdict[0].lower() + found.verdict[1:]
        yield f"Calibration had {found.samples} samples: {verdict}"


def _layers(comparison: Comparison, rows: list[Row]) -> Iterator[str]:
    """Yield which layer to leave float, where all of them in integers measurably cost accuracy."""
    found = comparison.sensitivity
    whole = [r for r in rows if r.kind == "ptq" and r.is_integer and "fp32" not in r.plan.values()]
    if found is None or not whole or any(row.lost.low <= 0 for row in whole):
        return
    ranked = found.ranked()
    costs = [max(row.cost(found.metric), 0.0) for row in ranked]
    worst, total = ranked[0], sum(costs)
    if worst.noise or not total or not math.isfinite(total) or costs[0] < SHARE * total:
        return
    more = sum(
        comparison.costs.of("size_mb", layer, "fp32")
        - comparison.costs.of("size_mb", layer, worst.format)
        for layer in found.units[worst.layer]
    )
    best = min(whole, key=lambda row: row.lost.mean)
    yield (
        f"Leave {worst.layer} float first: alone in {worst.format} it has {costs[0] / total:.0%} "
        f"of all {len(ranked)} units' {found.metric} ({costs[0]:.3g}, {found.n} samples), for "
        f"{more:.3f} MB more; with no layer float the best, {best.name}, {loses(best.lost)}."
    )


def _next(rows: list[Row]) -> Iterator[str]:
    """Yield what was not tried, where none of what was tried is good enough."""
    ptq = [row for row in rows if row.kind == "ptq" and row.is_integer]
    if not ptq:
        return
    best = min(ptq, key=lambda row: row.lost.mean)
    told = f"the best without training or a mix of formats, {best.name}, {loses(best.lost)}"
    kinds = {row.kind for row in rows}
    if not any(row.method.get("repair") for row in ptq):
        yield f"Try repair, which takes no training: {told}."
    elif "mixed" not in kinds:
        yield f"Try mixed precision: {told}."
    elif "qat" not in kinds:
        yield f"Try QAT: {told}."


def _training(rows: list[Row]) -> Iterator[str]:
    """Yield which training had not settled when it ended."""
    for row in rows:
        losses = [line["train/loss"] for line in row.history if "train/loss" in line]
        if len(losses) > 1 and losses[-1] < (1 - FALLING) * losses[-2]:
            yield (
                f"{row.name} had not settled when it ended: the training loss still fell from "
                f"{losses[-2]:.4g} to {losses[-1]:.4g} in epoch {len(losses)}; train longer."
            )
