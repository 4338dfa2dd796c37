"""Ranges as pictures: of all quantizers, and of one with the distribution it is from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from lq.distribution import TensorHistogram
from lq.plots.rows import name_rows, rows_size
from lq.plots.style import add_legend, line_look, log_x, new_figure, theme_of
from lq.surgery import quantizers

Amax = Mapping[str, Any]
"""Quantizer -> its range: a number, or one for each channel."""
_WEIGHT, _INPUT = "weight_quantizer", "input_quantizer"


def plot_ranges(ranges: nn.Module | Amax, top: int | None = None, theme: str = "light") -> Figure:
    """Draw the range of every quantizer: a point for inputs, and for weights the channels' span.

    Rows are layers, in the order of the model; quantizers that are no layer's have their own.

    Args:
        ranges: A calibrated model, or quantizer -> amax.
        top: Only so many rows, those with the largest ranges of inputs.
        theme: ``light`` or ``dark``.

    Example:
        >>> figure = plot_ranges({"fc.input_quantizer": 2.5, "fc.weight_quantizer": [0.1, 0.4]})
        >>> [text.get_text() for text in figure.axes[0].get_yticklabels()]
        ['fc']
    """
    amax = _ranges_of(ranges) if isinstance(ranges, nn.Module) else ranges
    found = {name: torch.as_tensor(value).flatten().tolist() for name, value in amax.items()}
    weights = {_owner(name): values for name, values in found.items() if name.endswith(_WEIGHT)}
    inputs = {_owner(name): v[0] for name, v in found.items() if not name.endswith(_WEIGHT)}
    rows = list(dict.fromkeys(_owner(name) for name in found))
    if top is not None and top < len(rows):
        rows = sorted(rows, key=lambda row: -inputs.get(row, 0.0))[:top]
    figure, (axes,) = new_figure(size=rows_size(len(rows)), theme=theme)
    _draw_inputs(axes, rows, inputs, theme)
    _draw_weights(axes, rows, weights, theme)
    name_rows(axes, rows)
    log_x(axes)
    axes.set_xlabel("largest magnitude that is not clipped (amax)")
    add_legend(figure, theme)
    return figure


def _ranges_of(model: nn.Module) -> dict[str, Any]:
    found = {n: q for n, q in quantizers(model).items() if q.scale is not None and q.is_calibrated}
    return {name: quantizer.amax for name, quantizer in found.items()}


def _owner(name: str) -> str:
    """Return the layer that a quantizer is of, or its own name."""
    before, _, last = name.rpartition(".")
    return (before or "model") if last in (_WEIGHT, _INPUT) else name


def _draw_inputs(axes: Axes, rows: Sequence[str], inputs: Mapping[str, float], theme: str) -> None:
    where = [i for i, row in enumerate(rows) if row in inputs]
    look = {**line_look(0, theme), "linestyle": "none", "markersize": 5}
    axes.plot([inputs[rows[i]] for i in where], where, label="input", **look)


def _draw_weights(
    axes: Axes, rows: Sequence[str], weights: Mapping[str, list[float]], theme: str
) -> None:
    where = [i for i, row in enumerate(rows) if row in weights]
    colour = theme_of(theme).colours[3]
    ends = [(min(weights[rows[i]]), max(weights[rows[i]])) for i in where]
    lows, highs = [low for low, _ in ends], [high for _, high in ends]
    axes.hlines(where, lows, highs, color=colour, linewidth=2, label="weight, by channel")
    for values in (lows, highs):
        axes.plot(values, where, "|", color=colour, markersize=6, markeredgewidth=1.5)


def plot_histogram(histogram: TensorHistogram, theme: str = "light") -> Figure:
    """Draw how the magnitudes of one tensor are distributed, and where each calibrator clips.

    Args:
        histogram: What ``lq.tensor_histograms`` measured of one quantizer.
        theme: ``light`` or ``dark``.
    """
    figure, (axes,) = new_figure(theme=theme)
    colours = theme_of(theme)
    axes.stairs(histogram.counts, histogram.edges, fill=True, color=colours.muted, baseline=0.5)
    highest = max(histogram.counts, default=1.0)
    heights = (0.95 - 0.11 * i for i in range(len(histogram.clips)))
    for i, ((name, amax), height) in enumerate(zip(histogram.clips.items(), heights, strict=True)):
        x_in_data, label = axes.get_xaxis_transform(), f"{name}: {amax:.3g}"
        axes.plot([amax] * 2, [0, height], label=label, transform=x_in_data, **line_look(i, theme))
    axes.set_yscale("log")
    axes.set_ylim(0.5, 3 * max(highest, 1.0))
    axes.set_xlim(left=0)
    axes.set(xlabel="magnitude", ylabel="values in the bin")
    axes.set_title(histogram.name, fontsize=10)
    add_legend(figure, theme, columns=3)
    return figure
