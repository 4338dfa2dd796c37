"""Pictures of results, each a function that returns a matplotlib figure."""

from lq.plots.comparison import (
    plot_accuracy,
    plot_drop_against_compression,
    plot_sizes,
    plot_speedups,
)
from lq.plots.plan import plot_plan
from lq.plots.ranges import plot_histogram, plot_ranges
from lq.plots.sensitivity import (
    plot_sensitivity,
    plot_sensitivity_distribution,
    plot_sensitivity_heatmap,
)
from lq.plots.style import save_figure
from lq.plots.training import plot_history, read_history
from lq.plots.weights import plot_rounding, plot_weight_error

__all__ = [
    "plot_accuracy",
    "plot_drop_against_compression",
    "plot_histogram",
    "plot_history",
    "plot_plan",
    "plot_ranges",
    "plot_rounding",
    "plot_sensitivity",
    "plot_sensitivity_distribution",
    "plot_sensitivity_heatmap",
    "plot_sizes",
    "plot_speedups",
    "plot_weight_error",
    "read_history",
    "save_figure",
]
