"""Post-training repair: win back, without training, what quantization cost a model."""

from lq.repairs.batchnorm import reestimate_batchnorm
from lq.repairs.bias import correct_biases
from lq.repairs.blame import layer_sqnr
from lq.repairs.equalization import equalize
from lq.repairs.report import Fidelity, RepairReport, RepairStep
from lq.repairs.run import METHODS, repair

__all__ = [
    "METHODS",
    "Fidelity",
    "RepairReport",
    "RepairStep",
    "correct_biases",
    "equalize",
    "layer_sqnr",
    "reestimate_batchnorm",
    "repair",
]
