"""Results of models small and large, to be drawn."""

import numpy as np
import timm
import torch

from lq.costs import Costs, count_costs
from lq.models import digits_cnn
from lq.sensitivity import LayerSensitivity, Sensitivity

FORMATS = ("int8", "fp16", "fp8_e4m3")


def costs_of(name: str) -> Costs:
    """Costs of the digits network, or of one of timm's by name."""
    if name == "digits":
        return count_costs(digits_cnn(), torch.zeros(1, 1, 8, 8))
    return count_costs(timm.create_model(name), torch.zeros(1, 3, 32, 32))


def sweep_of(units, metric: str = "kl", formats=FORMATS) -> Sensitivity:
    """A sweep with numbers over five orders of magnitude, some of them noise."""
    rng = np.random.default_rng(0)
    rows = []
    for format in formats:
        for unit in units:
            value = float(10 ** rng.uniform(-5, -0.5))
            low = value * float(rng.choice([0.6, -0.1]))
            rows.append(
                LayerSensitivity(
                    layer=unit,
                    format=format,
                    kl=value,
                    top1_drop=value - 1e-3,
                    sqnr_db=float(-10 * np.log10(value)),
                    low=low,
                    high=value * 1.5,
                    noise=low < 0,
                )
            )
    names = {unit: (unit,) for unit in units}
    return Sensitivity(found=rows, units=names, formats=formats, method="exact", metric=metric, n=9)
