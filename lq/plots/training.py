"""How training went, as curves."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lq.plots.style import WIDTH, add_legend, line_look, new_figure, percent_axis

GROUPS = {"loss": ("loss",), "accuracy": ("top1", "top5", "acc"), "learning rate": ("lr-", "lr")}
"""Panel -> what the names of its metrics have in them."""


def read_history(path: str | Path) -> list[dict[str, float]]:
    """Return what Lightning's ``CSVLogger`` wrote, one dict of means for each epoch.

    Args:
        path: ``metrics.csv``, or the folder that it is in.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no epochs.
    """
    path = Path(path)
    path = path / "metrics.csv" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"Expected a metrics.csv at {str(path)!r}, but there is no file.")
    epochs: dict[float, defaultdict[str, list[float]]] = {}
    waiting: list[tuple[str, float]] = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            waiting += [(name, float(value)) for name, value in row.items() if value]
            if row.get("epoch"):  # a learning rate's line has none
                found = epochs.setdefault(float(row["epoch"]), defaultdict(list))
                for name, value in waiting:
                    found[name].append(value)
                waiting = []
    if not epochs:
        raise ValueError(f"Expected epochs in {str(path)!r}, but no line has one.")
    return [{n: fmean(v) for n, v in epochs[epoch].items()} for epoch in sorted(epochs)]


def plot_history(history: Sequence[Mapping[str, float]], theme: str = "light") -> Figure:
    """Draw losses, accuracies and learning rates over the epochs, each in its panel.

    Args:
        history: For each epoch its ``epoch`` and metrics, such as ``train_loss`` and ``val_top1``;
            what has no ``loss``, ``top1``, ``top5``, ``acc`` or ``lr`` in its name is not drawn.
        theme: ``light`` or ``dark``.

    Raises:
        ValueError: If there is nothing to draw.

    Example:
        >>> history = [{"epoch": 0, "train_loss": 2.1}, {"epoch": 1, "train_loss": 1.4}]
        >>> figure = plot_history(history)
        >>> figure.axes[0].get_lines()[0].get_ydata().tolist()
        [2.1, 1.4]
    """
    names = list(dict.fromkeys(name for row in history for name in row))
    panels = {group: _of_group(names, group) for group in GROUPS}
    panels = {group: found for group, found in panels.items() if found}
    if not panels:
        raise ValueError(
            f"Expected metrics such as train_loss and val_top1, but got {names}; log them, or name "
            "them so."
        )
    size = (WIDTH, 2.6 * len(panels))
    figure, grid = new_figure(rows=len(panels), size=size, theme=theme, sharex=True)
    drawn = 0
    for axes, (group, metrics) in zip(grid, panels.items(), strict=True):
        for metric in metrics:
            points = [(row["epoch"], row[metric]) for row in history if metric in row]
            epochs, values = zip(*points, strict=True)
            axes.plot(epochs, values, label=metric, **line_look(drawn, theme))
            drawn += 1
        axes.set_ylabel(group)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if group == "accuracy":
            percent_axis(axes.yaxis)
    grid[-1].set_xlabel("epoch")
    add_legend(figure, theme, columns=3)
    return figure


def _of_group(names: Sequence[str], group: str) -> list[str]:
    """Return the metrics of a panel; a name that fits several is of the first."""
    for other, words in GROUPS.items():
        fitting = [name for name in names if any(word in name for word in words)]
        if other == group:
            return fitting
        names = [name for name in names if name not in fitting]
    return []
