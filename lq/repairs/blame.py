"""Which layers cause the loss."""

from __future__ import annotations

from typing import Any

from torch import nn
from tqdm.auto import tqdm

from lq.functional import sqnr_db
from lq.modes import quantizer_mode
from lq.quantizer import Mode
from lq.repairs.running import check_ready, outputs
from lq.surgery import quantized_layers


def layer_sqnr(model: nn.Module, batch: Any, progress: bool = True) -> dict[str, float]:
    """Return the SQNR of a model's output where only one layer is quantized, the worst first.

    ``SQNR = 10 log10(sum(float^2) / sum((float - one layer quantized)^2))``, in dB

    Args:
        model: A calibrated model.
        batch: One batch as ``calibrate`` takes them.
        progress: Show a progress bar.

    Returns:
        Decibels by layer name.
    """
    check_ready(model)
    found = {}
    with quantizer_mode(model, Mode.BYPASS):
        wanted = outputs(model, batch)
        layers = quantized_layers(model).items()
        for name, layer in tqdm(layers, "Blaming layers", disable=not progress, leave=False):
            with quantizer_mode(layer, Mode.QUANTIZE):
                found[name] = sqnr_db(wanted, outputs(model, batch))
    return dict(sorted(found.items(), key=lambda item: item[1]))
