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


def freeze_scales(model: nn.Module, frozen: bool = True) -> None:
    """Let ranges that learn or follow stay where they are, or move again."""
    for quantizer in quantizers(model).values():
        quantizer.is_frozen = frozen


def set_bits(model: nn.Module, bits: int | None) -> None:
    """Let integer formats of fewer bits have that many for now; ``None`` for their own.

    The ranges stay: ``scale * qmax`` is the same magnitude with any number of bits, so what is
    saved meanwhile fits the formats of the recipe.
    """
    for quantizer in quantizers(model).values():
        if quantizer.spec.number_format.is_integer:
            quantizer.bits = bits


def save_memory(model: nn.Module, enabled: bool = True) -> None:
    """Let the backward pass quantize again instead of saving a quantized copy of every input.

    Gradients are the same, bit for bit. Attention saves its copies all the same, and a compiled
    program decides for itself.
    """
    for quantizer in quantizers(model).values():
        quantizer.memory_efficient = enabled


def freeze_batchnorm(model: nn.Module) -> set[nn.Module]:
    """Let BatchNorm layers use and keep their running statistics, until ``model.train()``.

    Returns:
        Those that did not already.
    """
    norms: set[nn.Module] = {m for m in model.modules() if isinstance(m, _BatchNorm) and m.training}
    for norm in norms:
        norm.eval()
    return norms
