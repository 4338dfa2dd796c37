"""The best mix of formats under limits, searched exactly and verified by measuring."""

from lq.mixed_precision.constraints import PrecisionConstraints, UnreachableError
from lq.mixed_precision.guard import GuardReport, Rung, accuracy_guard
from lq.mixed_precision.loop import Trial
from lq.mixed_precision.searching import Prediction, SearchedPlan, pareto_front, search
from lq.mixed_precision.verify import VerifiedPlan, verified_search
from lq.paired import Drop, paired_drop

__all__ = [
    "Drop",
    "GuardReport",
    "PrecisionConstraints",
    "Prediction",
    "Rung",
    "SearchedPlan",
    "Trial",
    "UnreachableError",
    "VerifiedPlan",
    "accuracy_guard",
    "paired_drop",
    "pareto_front",
    "search",
    "verified_search",
]
