"""Methods of quantizing, compared on the same samples and in the same engine."""

from lq.comparison.explained import CalibrationSize, Explanation
from lq.comparison.method import Method, default_methods, parse_methods
from lq.comparison.result import Comparison
from lq.comparison.row import Row
from lq.comparison.run import compare
from lq.comparison.speed import Speedup

__all__ = [
    "CalibrationSize",
    "Comparison",
    "Explanation",
    "Method",
    "Row",
    "Speedup",
    "compare",
    "default_methods",
    "parse_methods",
]
