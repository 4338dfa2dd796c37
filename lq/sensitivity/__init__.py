"""Which layer hurts: what each unit of a model costs in each number format."""

from lq.sensitivity.result import LayerSensitivity, Measures, Sensitivity

__all__ = ["LayerSensitivity", "Measures", "Sensitivity"]
