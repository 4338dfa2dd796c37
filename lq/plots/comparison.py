"""A comparison as pictures: accuracy, size and speed of each method."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lq.comparison import Comparison, Row
from lq.comparison.speed import Setting
from lq.plots.rows import draw_bars, name_rows, rows_size
from lq.plots.style import (
    HATCHES,
    MARKERS,
    SMALL,
    add_legend,
    elide,
    new_figure,
    percent_axis,
    theme_of,
)

_BESIDE, _APART = 0.035, 0.055
"""Of a number from its point, and from the next number: shares of the width and the height."""
_LOOKS = {"float": (6, 0), "ptq": (0, 0), "qat": (2, 1), "mixed": (1, 2), "file": (4, 3)}
"""Kind of a method -> its colour, and its hatch or marker."""
_NAMES = {
    "float": "float",
    "ptq": "PTQ",
    "qat": "QAT",
    "mixed": "mixed precision",
    "file": "file",
}


def plot_accuracy(comparison: Comparison, theme: str = "light") -> Figure:
    """Draw the top-1 that each method loses against float, with its 95% interval.

    The line at 0 is the float model. An interval across it shows no difference.

    Args:
        comparison: What ``lq.compare`` found.
        theme: ``light`` or ``dark``.
    """
    rows = [row for row in comparison.measured if row.drop is not None]
    figure, (axes,) = new_figure(size=rows_size(len(rows)), theme=theme)
    ink = theme_of(theme).text
    for i, (row, label) in enumerate(zip(rows, _labels(rows), strict=True)):
        drop = row.lost
        colour = _look(row, theme)[0]
        axes.hlines(i, drop.low, drop.high, color=colour, linewidth=2.2)
        _point(axes, drop.mean, i, row, label, theme)
    add_legend(figure, theme)
    axes.axvline(0, color=ink, linewidth=1)
    name_rows(axes, [row.name for row in rows])
    axes.set_xlabel("top-1 lost against float (95%)")
    percent_axis(axes.xaxis, 1)
    top1 = comparison.measured[0].evaluation
    assert top1 is not None
    axes.set_title(f"float {top1.top1:.2%}, {comparison.n} test samples", fontsize=10)
    return figure


def plot_drop_against_compression(comparison: Comparison, theme: str = "light") -> Figure:
    """Draw what each method loses against how much smaller its file is; best is right and low.

    Methods are numbered as in the legend, so that points that lie on each other stay legible.

    Args:
        comparison: What ``lq.compare`` found.
        theme: ``light`` or ``dark``.
    """
    rows = [row for row in comparison.deployed if row.drop is not None]
    size = (rows_size(1)[0], 3.4 + 0.16 * ((len(rows) + 1) // 2))
    figure, (axes,) = new_figure(size=size, theme=theme)
    ink = theme_of(theme).text
    for i, row in enumerate(rows):
        drop = row.lost
        colour = _look(row, theme)[0]
        x = comparison.compression(row)
        axes.vlines(x, drop.low, drop.high, color=colour, linewidth=1.2, alpha=0.7)
        label = f"{i + 1}  {elide(row.name, 18)}: {x:.2f}x, {100 * drop.mean:+.2f}"
        _point(axes, x, drop.mean, row, label, theme)
    axes.axhline(0, color=ink, linewidth=1)
    axes.set(xlabel="times as small as the float file", ylabel="top-1 lost against float (95%)")
    percent_axis(axes.yaxis, 1)
    axes.margins(x=0.1, y=0.1)
    _number_points(axes, [(comparison.compression(r), r.lost.mean) for r in rows], theme)
    add_legend(figure, theme, columns=2)
    return figure


def plot_sizes(comparison: Comparison, theme: str = "light") -> Figure:
    """Draw the size of each method's file.

    Args:
        comparison: What ``lq.compare`` found.
        theme: ``light`` or ``dark``.
    """
    rows = comparison.deployed
    values = [row.size_mb for row in rows]
    labels = [
        f"{size:.3g} MB, {comparison.compression(row):.2f}x"
        for size, row in zip(values, rows, strict=True)
    ]
    return _bars(rows, values, labels, "MB (10^6 bytes)", "size of the file", theme)


def plot_speedups(comparison: Comparison, theme: str = "light") -> Figure:
    """Draw how many times as fast as float each method's file is, with the 95% interval.

    A panel for each batch size and number of threads that was timed.

    Args:
        comparison: What ``lq.compare`` found; with times.
        theme: ``light`` or ``dark``.

    Raises:
        ValueError: If no times were measured.
    """
    rows, settings = [row for row in comparison.measured if row.speedups], comparison.settings
    if not settings:
        raise ValueError("Expected a comparison with times, but none were measured.")
    width, height = rows_size(len(rows))
    figure, panels = new_figure(len(settings), 1, (width, height * len(settings)), theme)
    for axes, setting in zip(panels, settings, strict=True):
        _draw_speedups(axes, rows, setting, theme)
    add_legend(figure, theme)
    return figure


def _draw_speedups(axes: Axes, rows: Sequence[Row], setting: Setting, theme: str) -> None:
    ink = theme_of(theme).text
    for i, (row, label) in enumerate(zip(rows, _labels(rows), strict=True)):
        found = row.speedup(setting)
        if found is not None:
            colour, hatch = _look(row, theme)[0], HATCHES[_LOOKS[row.kind][1]]
            draw_bars(axes, [i], [found.ratio], (colour, hatch), theme, label)
            axes.hlines(i, found.low, found.high, color=ink, linewidth=1.4)
            end = max(found.high, found.ratio)
            axes.annotate(
                f"{found.ratio:.2f}x", (end, i), (4, 0), textcoords="offset points", color=ink,
                fontsize=SMALL, va="center",
            )  # fmt: skip
    axes.axvline(1, color=ink, linewidth=1)
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    name_rows(axes, [row.name for row in rows])
    size, threads = setting
    samples = f"{size} sample{'s' * (size != 1)} at a time"
    count = f", {threads} thread{'s' * (threads != 1)}" if threads else ""
    axes.set_title(f"{samples}{count}", fontsize=10)
    axes.set_xlabel("times as fast as float (95%)")


def _bars(
    rows: Sequence[Row],
    values: Sequence[float],
    labels: Sequence[str],
    axis: str,
    title: str,
    theme: str,
) -> Figure:
    figure, (axes,) = new_figure(size=rows_size(len(rows)), theme=theme)
    for i, (row, kind) in enumerate(zip(rows, _labels(rows), strict=True)):
        look = _look(row, theme)[0], HATCHES[_LOOKS[row.kind][1]]
        bars = draw_bars(axes, [i], [values[i]], look, theme, kind)
        axes.bar_label(bars, [labels[i]], padding=4, fontsize=SMALL, color=theme_of(theme).text)
    axes.margins(x=0.3)
    axes.set_xlim(left=0)
    name_rows(axes, [row.name for row in rows])
    axes.set_xlabel(axis)
    axes.set_title(title, fontsize=10)
    add_legend(figure, theme)
    return figure


def _point(axes: Axes, x: float, y: float, row: Row, label: str | None, theme: str) -> None:
    colour, marker = _look(row, theme)
    ink = theme_of(theme).text
    axes.plot(x, y, marker, color=colour, markeredgecolor=ink, markersize=7, label=label)


def _labels(rows: Sequence[Row]) -> list[str | None]:
    """Return what the legend calls the first row of each kind."""
    kinds = [row.kind for row in rows]
    return [None if k in kinds[:i] else _NAMES[k] for i, k in enumerate(kinds)]


def _number_points(axes: Axes, points: Sequence[tuple[float, float]], theme: str) -> None:
    """Write the number of each point beside it, and those of points near each other in a column."""
    ink, (left, right), (bottom, top) = theme_of(theme).text, axes.get_xlim(), axes.get_ylim()
    axes.set(xlim=(left, right), ylim=(bottom, top))
    places = [((x - left) / (right - left), (y - bottom) / (top - bottom)) for x, y in points]
    for column in _columns([x for x, _ in places]):
        order = sorted(column, key=lambda i: places[i][1])
        x = max(places[i][0] for i in column) + _BESIDE
        for i, y in zip(order, spread([places[i][1] for i in order], _APART), strict=True):
            line = {"arrowstyle": "-", "color": ink, "linewidth": 0.5}
            text = axes.annotate(
                str(i + 1), points[i], (x, y), textcoords="axes fraction", color=ink,
                fontsize=SMALL, va="center", arrowprops=line,
            )  # fmt: skip
            text.set_bbox({"facecolor": theme_of(theme).background, "pad": 0.5, "linewidth": 0})


def _columns(places: Sequence[float]) -> list[list[int]]:
    """Return points whose numbers would stand in each other's way, from left to right."""
    found: list[list[int]] = []
    for i in sorted(range(len(places)), key=lambda i: places[i]):
        if found and places[i] - places[found[-1][-1]] < 2 * _BESIDE:
            found[-1].append(i)
        else:
            found.append([i])
    return found


def spread(values: Sequence[float], apart: float) -> list[float]:
    """Return increasing numbers moved apart as little as that takes, about where they were.

    Example:
        >>> [round(x, 2) for x in spread([0.5, 0.5, 0.9], 0.1)]
        [0.45, 0.55, 0.9]
    """
    groups: list[list[float]] = []
    for value in values:
        groups.append([value])
        while len(groups) > 1 and _start(groups[-1], apart) < _end(groups[-2], apart) + apart:
            groups[-2:] = [groups[-2] + groups[-1]]
    return [_start(group, apart) + apart * i for group in groups for i in range(len(group))]


def _start(group: Sequence[float], apart: float) -> float:
    return sum(group) / len(group) - apart * (len(group) - 1) / 2


def _end(group: Sequence[float], apart: float) -> float:
    return _start(group, apart) + apart * (len(group) - 1)


def _look(row: Row, theme: str) -> tuple[str, str]:
    place, marker = _LOOKS[row.kind]
    return theme_of(theme).colours[place], MARKERS[marker]
