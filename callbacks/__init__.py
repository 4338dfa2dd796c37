"""Callbacks that bring quantization to any Lightning project."""

if __name__ != "lq.callbacks":
    raise ImportError(f"Import these callbacks as lq.callbacks, not as {__name__!r}.")

from lq.callbacks.calibration import Calibration
from lq.callbacks.distillation import Distillation
from lq.callbacks.engine_comparison import EngineComparison
from lq.callbacks.export import Export
from lq.callbacks.mixed_precision import MixedPrecision
from lq.callbacks.oscillation import OscillationControl
from lq.callbacks.quantization_aware_training import QuantizationAwareTraining
from lq.callbacks.quantizer_monitor import QuantizerMonitor
from lq.callbacks.sensitivity_sweep import SensitivitySweep

__all__ = [
    "Calibration",
    "Distillation",
    "EngineComparison",
    "Export",
    "MixedPrecision",
    "OscillationControl",
    "QuantizationAwareTraining",
    "QuantizerMonitor",
    "SensitivitySweep",
]
