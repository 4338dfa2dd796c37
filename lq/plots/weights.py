"""Rounding as pictures: the staircase of a grid, and what it does to a weight."""

from __future__ import annotations

import math

import torch
from matplotlib.figure import Figure

from lq.functional import amax_to_scale, fake_quantize
from lq.plots.style import add_legend, line_look, new_figure, theme_of
from lq.rounding import WeightError
from lq.tensor_spec import QuantSpec

POINTS = 2001


def plot_rounding(spec: QuantSpec, amax: float = 1.0, theme: str = "light") -> Figure:
    """Draw what a quantizer makes of each number, and the error it makes.

    Args:
        spec: The grid, such as ``QuantSpec("int4")``.
        amax: The largest magnitude that is not clipped.
        theme: ``light`` or ``dark``.

    Raises:
        ValueError: If the format has no scale.
    """
    if not spec.needs_scale:
        raise ValueError(f"Expected a format with a scale, but got {spec.format!r}.")
    x = torch.linspace(-1.4 * amax, 1.4 * amax, POINTS)
    y = fake_quantize(x, amax_to_scale(torch.tensor(amax), spec.qmax), spec.qmin, spec.qmax)
    figure, (left, right) = new_figure(columns=2, size=(8.4, 3.4), theme=theme)
    first, second = ({**line_look(i, theme), "marker": "none", "linewidth": 1.6} for i in range(2))
    left.plot(x, x, label="float", **second)
    left.plot(x, y, label=spec.format, **first)
    right.plot(x, y - x, label="error", **{**first, "color": theme_of(theme).colours[3]})
    for axes in (left, right):
        for end in (-amax, amax):
            axes.axvline(end, color=theme_of(theme).text, linewidth=0.8, linestyle=":")
        axes.set_xlabel("number")
    left.set_ylabel("quantized")
    right.set_ylabel("quantized less number")
    add_legend(figure, theme)
    return figure


def plot_weight_error(error: WeightError, theme: str = "light") -> Figure:
    """Draw a weight in four panels: as float, as codes, the error, and the SQNR by channel.

    Args:
        error: What ``lq.weight_error`` measured.
        theme: ``light`` or ``dark``.
    """
    figure, (before, after, errors, channels) = new_figure(2, 2, size=(8.4, 6.2), theme=theme)
    colours = theme_of(theme).colours
    before.stairs(error.before, error.edges, fill=True, color=colours[0])
    before.set_title("float weights", fontsize=10)
    before.set(xlabel="value", ylabel="weights")
    width = min(max(180 / max(len(error.codes), 1), 0.8), 6)
    after.vlines(error.codes, 0, error.code_counts, color=colours[1], linewidth=width)
    after.set_ylim(bottom=0)
    after.set_title(f"{len(error.codes)} codes of {error.format}", fontsize=10)
    after.set(xlabel="code", ylabel="weights")
    errors.stairs(error.errors, error.error_edges, fill=True, color=colours[3])
    errors.set_title("error", fontsize=10)
    errors.set(xlabel="float less quantized, in steps", ylabel="weights")
    finite = [i for i, v in enumerate(error.channel_sqnr_db) if math.isfinite(v)]
    look = {**line_look(0, theme), "linestyle": "none", "markersize": 3}
    channels.plot(finite, [error.channel_sqnr_db[i] for i in finite], **look)
    channels.axhline(error.sqnr_db, color=theme_of(theme).text, linestyle="--", linewidth=1)
    channels.set_title(f"SQNR by channel; {error.sqnr_db:.1f} dB of all", fontsize=10)
    channels.set(xlabel="output channel", ylabel="dB")
    if error.name:
        figure.suptitle(error.name, fontsize=11, color=theme_of(theme).text)
    return figure
