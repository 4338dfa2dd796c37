"""What a sweep found, as pictures: which layer hurts, how unequal layers are, format by format."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure

from lq.plots.rows import draw_bars, name_rows, rows_size
from lq.plots.style import (
    HATCHES,
    SMALL,
    add_legend,
    dress,
    line_look,
    log_x,
    new_figure,
    percent_axis,
    theme_of,
)
from lq.sensitivity import CLASSES, LayerSensitivity, Sensitivity, sensitivity_classes

METRIC_NAMES = {
    "top1": "top-1 lost",
    "top5": "top-5 lost",
    "loss": "loss gained, nats",
    "kl": "KL from float, nats",
    "sqnr": "SQNR of the outputs, dB (less is worse)",
}
_COSTS = {**METRIC_NAMES, "sqnr": "noise / signal of the outputs"}
_CLASS_LOOKS = {"high": (3, HATCHES[0]), "medium": (1, HATCHES[1]), "low": (0, HATCHES[2])}
_CLASS_NAMES = {"high": "high", "medium": "medium", "low": "low, or within noise"}


def plot_sensitivity(
    sensitivity: Sensitivity,
    format: str | None = None,
    top: int | None = None,
    theme: str = "light",
) -> Figure:
    """Draw what each unit costs in a format, the worst first, with its 95% interval.

    Args:
        sensitivity: What a sweep found.
        format: One of its formats; the first, if not given.
        top: Only so many units.
        theme: ``light`` or ``dark``.

    Example:
        >>> rows = [LayerSensitivity(layer="conv", format="int8", kl=0.02, low=0.01, high=0.03)]
        >>> found = Sensitivity(found=rows, units={"conv": ("conv",)}, formats=("int8",),
        ...                     method="exact", metric="kl", n=64)
        >>> plot_sensitivity(found).axes[0].get_title()
        'One unit at a time in int8: 64 samples'
    """
    ranked = sensitivity.ranked(format)
    rows = ranked[:top]
    classes = sensitivity_classes(sensitivity, format)
    figure, (axes,) = new_figure(size=rows_size(len(rows)), theme=theme)
    for kind in CLASSES:
        where = [i for i, row in enumerate(rows) if classes[row.layer] == kind]
        if where:
            colour, hatch = _CLASS_LOOKS[kind]
            values = [_drawable(rows[i], sensitivity.metric) for i in where]
            look = theme_of(theme).colours[colour], hatch
            draw_bars(axes, where, values, look, theme, _CLASS_NAMES[kind])
    _draw_intervals(axes, rows, theme)
    name_rows(axes, [row.layer for row in rows])
    part = "" if len(rows) == len(ranked) else f"worst {len(rows)} of {len(ranked)}, "
    title = f"One unit at a time in {rows[0].format}: {part}{sensitivity.n} samples"
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(METRIC_NAMES[sensitivity.metric])
    add_legend(figure, theme)
    return figure


def _drawable(row: LayerSensitivity, metric: str) -> float:
    value = row.value(metric)
    return value if math.isfinite(value) else 0.0


def _draw_intervals(axes: Axes, rows: list[LayerSensitivity], theme: str) -> None:
    known = [i for i, r in enumerate(rows) if math.isfinite(r.low) and math.isfinite(r.high)]
    lows, highs = [rows[i].low for i in known], [rows[i].high for i in known]
    axes.hlines(known, lows, highs, color=theme_of(theme).text, linewidth=1.4, label="95%")
    for ends in (lows, highs):
        axes.plot(ends, known, "|", color=theme_of(theme).text, markersize=5)


def plot_sensitivity_distribution(sensitivity: Sensitivity, theme: str = "light") -> Figure:
    """Draw how the costs of units are distributed: for each format, the share that cost less.

    Each point is a unit. Where costs are positive the axis is logarithmic.

    Args:
        sensitivity: What a sweep found.
        theme: ``light`` or ``dark``.
    """
    figure, (axes,) = new_figure(theme=theme)
    lowest = math.inf
    for i, format in enumerate(sensitivity.formats):
        costs = np.sort([r.cost(sensitivity.metric) for r in sensitivity.ranked(format)])
        shares = np.arange(1, len(costs) + 1) / len(costs)
        axes.plot(costs, shares, drawstyle="steps-post", label=format, **line_look(i, theme))
        lowest = min(lowest, costs[0])
    if lowest > 0:
        log_x(axes)
    axes.set(xlabel=_COSTS[sensitivity.metric], ylabel="share of units that cost no more")
    axes.set_title(f"{len(sensitivity.units)} units, {sensitivity.n} samples", fontsize=10)
    add_legend(figure, theme)
    percent_axis(axes.yaxis)
    return figure


def plot_sensitivity_heatmap(sensitivity: Sensitivity, theme: str = "light") -> Figure:
    """Draw the cost of every unit in every format, in the order of the model; numbers in cells.

    Args:
        sensitivity: What a sweep found.
        theme: ``light`` or ``dark``.
    """
    units, formats, metric = sensitivity.layers, sensitivity.formats, sensitivity.metric
    found = {(r.layer, r.format): r.cost(metric) for r in sensitivity if r.part == "both"}
    costs = np.array([[found.get((u, f), math.nan) for f in formats] for u in units])
    figure, (axes,) = new_figure(size=rows_size(len(units)), theme=theme)
    norm = _norm(costs)
    image = axes.imshow(costs, theme_of(theme).colourmap, norm, aspect="auto")
    name_rows(axes, units)
    axes.grid(visible=False)
    axes.set_xticks(range(len(formats)), formats)
    axes.set_title(_COSTS[metric], fontsize=10)
    for (row, column), cost in np.ndenumerate(costs):
        if math.isfinite(cost):
            ink = "black" if norm(cost) > 0.5 else "snow"  # white is the paper of a report
            axes.text(column, row, f"{cost:.2g}", ha="center", va="center", color=ink, fontsize=7)
    bar = figure.colorbar(image, ax=axes, shrink=min(1.0, 3 / figure.get_figheight()))
    dress(bar.ax, theme)
    bar.ax.grid(visible=False)
    bar.ax.tick_params(labelsize=SMALL)
    bar.minorticks_off()
    return figure


def _norm(costs: np.ndarray) -> Normalize:
    """Return a logarithmic scale where all is positive, and an even one elsewhere."""
    finite = costs[np.isfinite(costs)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 1.0)
    return LogNorm(low, high) if 0 < low < high else Normalize(low, high)
