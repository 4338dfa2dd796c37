"""Pictures of results, each a function that returns a matplotlib figure."""

from lq.plots.plan import plot_plan
from lq.plots.sensitivity import (
    plot_sensitivity,
    plot_sensitivity_distribution,
    plot_sensitivity_heatmap,
)
from lq.plots.style import save_figure

__all__ = [
    "plot_plan",
    "plot_sensitivity",
    "plot_sensitivity_distribution",
    "plot_sensitivity_heatmap",
    "save_figure",
]
