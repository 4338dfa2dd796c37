"""What all pictures share: colours, themes, and how a figure begins and is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from lq.files import written_whole
from lq.messages import suggest

WIDTH, HEIGHT = 5.6, 3.4
"""Inches of one panel: narrow, so that text stays legible on a phone."""
DPI = 144
SMALL = 8
"""Points of the smallest text."""
HATCHES = ("", "///", "...", "xxx", "\\\\\\", "++", "ooo", "---")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_FILES = (".png", ".svg")


@dataclass(frozen=True)
class Theme:
    """Colours of a figure.

    Attributes:
        background: Behind everything.
        text: Text, axes and the outlines of bars.
        muted: Grid lines and what is less important.
        colours: Of the data, told apart by colour-blind readers too (Okabe and Ito 2008).
        colourmap: Of heat maps, in the order of lightness.
    """

    background: str
    text: str
    muted: str
    colours: tuple[str, ...]
    colourmap: str = "cividis"


_BLUE, _ORANGE, _GREEN, _RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_PURPLE, _SKY, _YELLOW, _GRAY = "#CC79A7", "#56B4E9", "#F0E442", "#999999"
THEMES = {
    "light": Theme(
        "#ffffff",
        "#1f2328",
        "#c8ccd1",
        (_BLUE, _ORANGE, _GREEN, _RED, _PURPLE, _SKY, _GRAY, _YELLOW),
    ),
    "dark": Theme(
        "#14181d",
        "#e6edf3",
        "#454c55",
        (_SKY, _ORANGE, _GREEN, _RED, _PURPLE, _YELLOW, _GRAY, "#3f97d3"),
    ),
}


def theme_of(name: str) -> Theme:
    """Return a theme by name.

    Raises:
        ValueError: For another name than ``light`` and ``dark``.
    """
    if name not in THEMES:
        raise ValueError(
            f"Expected `theme` to be light or dark, but got {name!r}; {suggest(name, THEMES)}"
        )
    return THEMES[name]


def new_figure(
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] | None = None,
    theme: str = "light",
    **grid: Any,
) -> tuple[Figure, list[Axes]]:
    """Return a figure of a grid of axes, and the axes row by row.

    Args:
        rows: Of axes.
        columns: Of axes.
        size: Width and height in inches; a panel's for each, if not given.
        theme: ``light`` or ``dark``.
        grid: What else ``Figure.subplots`` takes, such as ``sharey`` and ``width_ratios``.

    Example:
        >>> figure, (left, right) = new_figure(columns=2, theme="dark")
        >>> figure.get_size_inches().tolist()
        [11.2, 3.4]
    """
    figure = blank_figure(size or (WIDTH * columns, HEIGHT * rows), theme)
    axes = figure.subplots(rows, columns, squeeze=False, **grid).flatten().tolist()
    for each in axes:
        dress(each, theme)
    return figure, axes


def blank_figure(size: tuple[float, float], theme: str = "light") -> Figure:
    """Return a figure without axes, whose layout sees to it that nothing overlaps."""
    return Figure(figsize=size, layout="constrained", facecolor=theme_of(theme).background)


def dress(axes: Axes, theme: str = "light") -> None:
    """Give axes the colours of a theme, a grid behind the data, and no frame."""
    colours = theme_of(theme)
    axes.set_facecolor(colours.background)
    axes.tick_params(colors=colours.text, labelsize=SMALL)
    for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
        text.set_color(colours.text)
    for side, spine in axes.spines.items():
        spine.set_color(colours.text)
        spine.set_visible(side in ("left", "bottom"))
    axes.grid(color=colours.muted, linewidth=0.6)
    axes.set_axisbelow(True)


def add_legend(figure: Figure, theme: str = "light", columns: int = 4) -> Legend:
    """Draw one legend above all axes of a figure, where it hides nothing."""
    colours, found = theme_of(theme), {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        found.update(dict(zip(labels, handles, strict=True)))
    return figure.legend(
        list(found.values()),
        list(found),
        loc="outside upper center",
        ncols=min(columns, max(len(found), 1)),
        frameon=False,
        labelcolor=colours.text,
        fontsize=SMALL,
    )


def line_look(index: int, theme: str = "light") -> dict[str, Any]:
    """Return colour, marker and dashes of the line with this number.

    Example:
        >>> line_look(0)
        {'color': '#0072B2', 'marker': 'o', 'linestyle': '-', 'markersize': 4, 'linewidth': 1.4}
    """
    colours = theme_of(theme).colours
    return {
        "color": colours[index % len(colours)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": ("-", "--", "-.", ":")[index % 4],
        "markersize": 4,
        "linewidth": 1.4,
    }


def percent_axis(axis: Axis, decimals: int | None = None) -> None:
    """Write the fractions along an axis as percentages."""
    axis.set_major_formatter(PercentFormatter(1.0, decimals))


def log_x(axes: Axes) -> None:
    """Make the x axis logarithmic once the data are drawn, its labels plain numbers that fit."""
    axes.set_xscale("log")
    axis, (low, high) = axes.xaxis, axes.get_xlim()
    within = (1, 2, 5) if high < 200 * low else (1,)
    axis.set_major_locator(LogLocator(subs=within))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def elide(name: str, longest: int = 28) -> str:
    """Return a long name without its middle; the end says more than the beginning.

    Example:
        >>> elide("encoder.layers.encoder_layer_11.self_attention.out_proj", 28)
        'encoder.l…attention.out_proj'
    """
    if len(name) <= longest:
        return name
    head = (longest - 1) // 3
    return f"{name[:head]}…{name[head + 1 - longest :]}"


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure to a PNG or SVG file, whole, and the same bytes each time.

    Raises:
        ValueError: For another kind of file.
    """
    path = Path(path)
    if path.suffix not in _FILES:
        raise ValueError(f"Expected a path that ends in .png or .svg, but got {str(path)!r}.")
    with written_whole(path) as temporary, matplotlib.rc_context({"svg.hashsalt": "lq"}):
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(temporary, format=path.suffix[1:], dpi=DPI, metadata=metadata)
