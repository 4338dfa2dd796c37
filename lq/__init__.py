"""Lightning Quantization: from a Lightning model to a verified INT8 engine."""

from typing import TYPE_CHECKING, Any

from lq.calibration import calibrate, find_ranges
from lq.checkpoint import load_from_checkpoint
from lq.parity import parity  # eager: the module of this name must not hide the function
from lq.quantizer import Mode, Quantizer
from lq.repairs import repair
from lq.sensitivity import sweep
from lq.spec import QuantSpec, Recipe, Rule
from lq.surgery import dequantize, quantize

if TYPE_CHECKING:
    from lq.comparison import Comparison, Method, compare
    from lq.convergence import calibration_curve
    from lq.costs import count_costs
    from lq.distribution import tensor_histograms
    from lq.engines import open_engine
    from lq.engines.drift import DriftMonitor
    from lq.evaluation import evaluate
    from lq.export import build_engine, export_onnx
    from lq.inspection import inspect
    from lq.latency import measure_latency
    from lq.mixed_precision import (
        PrecisionConstraints,
        accuracy_guard,
        pareto_front,
        search,
        verified_search,
    )
    from lq.module import QuantModule
    from lq.plan import PrecisionPlan
    from lq.rounding import weight_error

__version__ = "0.1.0"
__all__ = [
    "Comparison",
    "DriftMonitor",
    "Method",
    "Mode",
    "PrecisionConstraints",
    "PrecisionPlan",
    "QuantModule",
    "QuantSpec",
    "Quantizer",
    "Recipe",
    "Rule",
    "accuracy_guard",
    "build_engine",
    "calibrate",
    "calibration_curve",
    "compare",
    "count_costs",
    "dequantize",
    "evaluate",
    "export_onnx",
    "find_ranges",
    "inspect",
    "lint",
    "load_from_checkpoint",
    "measure_latency",
    "open_engine",
    "pareto_front",
    "parity",
    "quantize",
    "repair",
    "search",
    "sweep",
    "tensor_histograms",
    "verified_search",
    "weight_error",
]

# Resolved on first use, so that `import lq` imports neither lightning nor onnx.
_LAZY = {
    **dict.fromkeys(
        ("PrecisionConstraints", "accuracy_guard", "pareto_front", "search", "verified_search"),
        "lq.mixed_precision",
    ),
    **dict.fromkeys(("Comparison", "Method", "compare"), "lq.comparison"),
    "DriftMonitor": "lq.engines.drift",
    "PrecisionPlan": "lq.plan",
    "QuantModule": "lq.module",
    "build_engine": "lq.export",
    "calibration_curve": "lq.convergence",
    "count_costs": "lq.costs",
    "evaluate": "lq.evaluation",
    "export_onnx": "lq.export",
    "inspect": "lq.inspection",
    "lint": "lq.export",
    "measure_latency": "lq.latency",
    "open_engine": "lq.engines",
    "tensor_histograms": "lq.distribution",
    "weight_error": "lq.rounding",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in ("callbacks", "interop"):
        return importlib.import_module(f"lq.{name}")
    raise AttributeError(f"module 'lq' has no attribute {name!r}")
