"""What quantization-aware training does to a model besides training it."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq.surgery import quantizers


def learns_scales(model: nn.Module) -> bool:
    """Return whether a model has scales that train."""
    return any(q.spec.learns_range for q in quantizers(model).values())


def copy_scales(source: nn.Module, copy: nn.Module) -> None:
    """Give a copy of a quantized model, such as its moving average, the ranges of the original."""
    found = quantizers(copy)
    for name, quantizer in quantizers(source).items():
        if quantizer.is_calibrated:
            found[name].restore(*quantizer.saved())


def freeze_scales(model: nn.Module) -> None:
    """Train learned ranges no further, and let moving averages stay where they are."""
    for quantizer in quantizers(model).values():
        quantizer.is_frozen = True
        for tensor in quantizer.range_tensors().values():
            tensor.requires_grad_(False)


def set_bits(model: nn.Module, bits: int | None) -> None:
    """Let integer formats of fewer bits have that many for now; ``None`` for their own.

    The ranges stay: ``scale * qmax`` is the same magnitude with any number of bits, so what is
    saved meanwhile fits the formats of the recipe.
    """
    for quantizer in quantizers(model).values():
        if quantizer.spec.format.startswith("int"):
            quantizer.bits = bits


def freeze_batchnorm(model: nn.Module) -> None:
    """Let BatchNorm layers use and keep their running statistics, until ``model.train()``."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
