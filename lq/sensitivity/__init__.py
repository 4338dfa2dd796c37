"""Which layer hurts: what each unit of a model costs in each number format."""

from lq.sensitivity.classes import CLASSES, sensitivity_classes
from lq.sensitivity.measures import METRICS, Measures
from lq.sensitivity.result import LayerSensitivity, Sensitivity
from lq.sensitivity.run import sweep

__all__ = [
    "CLASSES",
    "METRICS",
    "LayerSensitivity",
    "Measures",
    "Sensitivity",
    "sensitivity_classes",
    "sweep",
]
