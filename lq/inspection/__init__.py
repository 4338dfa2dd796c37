"""Look into files: which formats, ranges and sizes they hold, and what is not calibrated."""

from lq.inspection.inspecting import inspect
from lq.inspection.result import Inspection

__all__ = ["Inspection", "inspect"]
