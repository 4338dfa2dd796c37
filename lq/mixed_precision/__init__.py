"""The best mix of formats under limits, searched exactly and verified by measuring."""

from lq.mixed_precision.constraints import PrecisionConstraints
from lq.mixed_precision.search import Prediction, SearchedPlan, pareto_front, search

__all__ = ["Prediction", "PrecisionConstraints", "SearchedPlan", "pareto_front", "search"]
