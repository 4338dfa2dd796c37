"""Methods of quantizing, compared on the same samples and in the same engine."""

from lq.comparison.method import Method, default_methods
from lq.comparison.result import CalibrationSize, Comparison
from lq.comparison.row import Row
from lq.comparison.run import compare
from lq.comparison.speed import Speedup

__all__ = [
    "CalibrationSize",
    "Comparison",
    "Method",
    "Row",
    "Speedup",
    "compare",
    "default_methods",
]
