"""Horizontal bars, one row for each layer, however many there are."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.container import BarContainer

from lq.plots.style import SMALL, WIDTH, elide, theme_of

ROW, LEAST_ROW, HIGHEST = 0.2, 0.16, 36.0
"""Inches of a row, of the least distance of two labels, and of the highest figure."""
_AROUND = 1.5
"""Inches that title, ticks and legend take."""
_FAR = 40
"""Rows from which the scale is repeated at the top."""


def rows_size(count: int, width: float = WIDTH, around: float = _AROUND) -> tuple[float, float]:
    """Return the width and height in inches of a figure with so many rows.

    Args:
        count: Rows.
        width: Inches.
        around: Inches of height that are no rows.

    Example:
        >>> rows_size(10), rows_size(1000)
        ((5.6, 3.5), (5.6, 36.0))
    """
    return width, min(around + ROW * max(count, 4), HIGHEST)


def all_fit(count: int) -> bool:
    """Return whether a figure has room for the text of so many rows."""
    return count * LEAST_ROW <= HIGHEST - _AROUND


def check_top(top: int | None) -> None:
    """Raise a ``ValueError`` where no row is asked for."""
    if top is not None and top < 1:
        raise ValueError(f"Expected `top` to be at least 1, but got {top}.")


def name_rows(axes: Axes, names: Sequence[str], longest: int = 28) -> None:
    """Put the rows' names along the left, the first at the top; only every so many if crowded."""
    every = math.ceil(len(names) * LEAST_ROW / (HIGHEST - _AROUND))
    shown = range(0, len(names), max(every, 1))
    axes.set_yticks(list(shown), [elide(names[i], longest) for i in shown], fontsize=SMALL)
    axes.set_ylim(max(len(names), 1) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
    if len(names) > _FAR:
        axes.tick_params(axis="x", labeltop=True, top=True)


def draw_bars(
    axes: Axes,
    positions: Sequence[float],
    values: Sequence[float],
    look: tuple[str, str],
    theme: str,
    label: str | None = None,
    left: Sequence[float] | float = 0.0,
) -> BarContainer:
    """Draw horizontal bars of one kind.

    Args:
        axes: Where.
        positions: Row of each bar.
        values: Length of each bar.
        look: Colour and hatch, so that kinds differ in print too.
        theme: ``light`` or ``dark``.
        label: For the legend.
        left: Where the bars begin.
    """
    colour, hatch = look
    return axes.barh(
        positions,
        values,
        left=left,
        height=0.72,
        color=colour,
        hatch=hatch,
        edgecolor=theme_of(theme).text,
        linewidth=0.6,
        label=label,
    )
