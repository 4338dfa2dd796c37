"""A precision plan as a picture: the format of each layer, and what it covers."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lq.costs import Costs
from lq.formats import FORMATS, layer_formats
from lq.plots.rows import draw_bars, name_rows, rows_size
from lq.plots.style import HATCHES, SMALL, add_legend, blank_figure, dress, percent_axis, theme_of

_LOOKS = {
    "int8": (0, 0),
    "fp16": (1, 1),
    "fp32": (6, 0),
    "bf16": (4, 4),
    "fp8_e4m3": (5, 3),
    "int4": (3, 2),
}
"""Format -> its colour and hatch; the same in every picture."""
_SHOWN = 0.07
"""The smallest share that is written into its bar."""


def plot_plan(plan: Mapping[str, str], costs: Costs, theme: str = "light") -> Figure:
    """Draw the format of each layer, with its shares of the parameters and of the compute.

    At the top are the shares of each format: of the numbers in the layers' weights, and of their
    multiply-accumulates.

    Args:
        plan: Layer -> format; a ``PrecisionPlan``, or any mapping. Layers not in it are float.
        costs: What ``lq.count_costs`` counted.
        theme: ``light`` or ``dark``.
    """
    formats = {name: plan.get(name, "fp32") for name in costs.layers}
    weights = _shares({name: layer.weights for name, layer in costs.layers.items()})
    macs = _shares({name: layer.macs for name, layer in costs.layers.items()})
    size = rows_size(len(formats), around=2.9)
    figure = blank_figure(size, theme)
    grid = figure.add_gridspec(2, 3, width_ratios=(0.22, 1, 1), height_ratios=(1.1, size[1] - 1.1))
    above = figure.add_subplot(grid[0, :])
    tiles, left, right = (figure.add_subplot(grid[1, i]) for i in range(3))
    for axes in (above, tiles, left, right):
        dress(axes, theme)
    _draw_totals(above, formats, (weights, macs), theme)
    _draw_layers(tiles, formats, dict.fromkeys(formats, 1.0), theme)
    _draw_layers(left, formats, weights, theme)
    _draw_layers(right, formats, macs, theme)
    tiles.set_xticks([])
    for axes, title in ((tiles, "format"), (left, "parameters"), (right, "compute")):
        axes.set_title(title, fontsize=SMALL + 1)
        if axes is not tiles:
            axes.tick_params(axis="y", labelleft=False)
            percent_axis(axes.xaxis)
    add_legend(figure, theme)
    return figure


def format_look(format: str, theme: str = "light") -> tuple[str, str]:
    """Return the colour and the hatch of a format.

    Example:
        >>> format_look("int8"), format_look("fp16")
        (('#0072B2', ''), ('#E69F00', '///'))
    """
    known = [f for f in FORMATS if f not in _LOOKS]
    first = layer_formats(format)[0]
    place = known.index(first) if first in known else len(format)
    colour, hatch = _LOOKS.get(format, (2 + place % 4, 3 + place % 5))
    return theme_of(theme).colours[colour], HATCHES[hatch]


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: count / total if total else 0.0 for name, count in counts.items()}


def _present(formats: Mapping[str, str]) -> list[str]:
    """Return the formats there are, the narrowest first."""
    bits = {f: FORMATS[layer_formats(f)[0]].bits for f in formats.values()}
    return sorted(bits, key=lambda f: (bits[f], f))


def _draw_totals(
    axes: Axes, formats: Mapping[str, str], parts: tuple[dict[str, float], ...], theme: str
) -> None:
    left = [0.0] * len(parts)
    for format in _present(formats):
        shares = [sum(s for n, s in part.items() if formats[n] == format) for part in parts]
        look = format_look(format, theme)
        bars = draw_bars(axes, range(len(parts)), shares, look, theme, format, left)
        labels = [f"{share:.0%}" if share >= _SHOWN else "" for share in shares]
        box = {"facecolor": theme_of(theme).background, "pad": 1, "linewidth": 0}
        for text in axes.bar_label(bars, labels, label_type="center", fontsize=SMALL):
            if text.get_text():
                text.set(color=theme_of(theme).text, bbox=box)
        left = [before + share for before, share in zip(left, shares, strict=True)]
    name_rows(axes, ["parameters", "compute"])
    axes.set_xlim(0, 1)
    percent_axis(axes.xaxis)


def _draw_layers(
    axes: Axes, formats: Mapping[str, str], lengths: Mapping[str, float], theme: str
) -> None:
    names = list(formats)
    for format in _present(formats):
        where = [i for i, name in enumerate(names) if formats[name] == format]
        values = [lengths[names[i]] for i in where]
        draw_bars(axes, where, values, format_look(format, theme), theme)
    name_rows(axes, names)
