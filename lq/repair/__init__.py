"""Post-training repair: win back, without training, what quantization cost a model."""

from lq.repair.batchnorm import reestimate_batchnorm
from lq.repair.bias import correct_biases
from lq.repair.blame import layer_sqnr
from lq.repair.equalization import equalize
from lq.repair.run import METHODS, Fidelity, RepairReport, RepairStep, repair

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
