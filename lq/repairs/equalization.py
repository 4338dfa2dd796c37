"""Cross-layer equalization: the same function with weights that are easier to round."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq.repairs.pairs import Pair, find_pairs
from lq.surgery import quantizers

MAX_ROUNDS = 20
TOLERANCE = 0.01
SMALLEST = 1e-4
"""Factors beyond 1e-4 ... 1e4 come from channels that are all but dead."""


def pair_factors(first: Tensor, second: Tensor) -> Tensor:
    """Return the factors that give two layers the same range in each channel between them.

    ``s = sqrt(r1 / r2)``, after which ``r1 / s = r2 * s``; 1 where a range is 0

    Args:
        first: Ranges ``[C]`` of the output channels of the first layer.
        second: Ranges ``[C]`` of the input channels of the second.

    Source: Nagel et al. 2019, equation 11.

    Example:
        >>> pair_factors(torch.tensor([8.0, 1.0, 0.0]), torch.tensor([2.0, 4.0, 1.0]))
        tensor([2.0000, 0.5000, 1.0000])
    """
    factors = (first / second).sqrt()
    usable = (first > 0) & (second > 0) & factors.isfinite()
    return torch.where(usable, factors, 1.0).clamp(SMALLEST, 1 / SMALLEST)


def output_ranges(layer: Any, norm: _BatchNorm | None) -> Tensor:
    """Return the largest weight of each output channel, ``[C]``, BatchNorm folded in."""
    ranges: Tensor = layer.weight.detach().flatten(1).abs().amax(1)
    return ranges if norm is None else ranges * _factor(norm).abs()


def input_ranges(layer: Any) -> Tensor:
    """Return the largest weight of each input channel, ``[C]``."""
    weight: Tensor = layer.weight.detach()
    groups = getattr(layer, "groups", 1)
    grouped = weight.abs().reshape(groups, -1, weight.shape[1], weight[0, 0].numel())
    return grouped.amax((1, 3)).flatten()


def _factor(norm: Any) -> Tensor:
    factor: Tensor = norm.weight / (norm.running_var + norm.eps).sqrt()
    return factor.detach()


def scale_outputs(layer: Any, norm: Any, by: Tensor) -> None:
    """Divide the output channels of a layer, or of the BatchNorm after it, by factors ``[C]``."""
    target = layer if norm is None else norm
    by = by.to(target.weight.dtype)
    target.weight.data /= _rows(by, target.weight)
    if target.bias is not None:
        target.bias.data /= by


def scale_inputs(layer: Any, by: Tensor) -> None:
    """Multiply the weights of each input channel of a layer by factors ``[C]``."""
    weight = layer.weight.data
    per_group = by.to(weight.dtype).view(getattr(layer, "groups", 1), 1, weight.shape[1], 1)
    grouped = weight.reshape(per_group.shape[0], -1, weight.shape[1], weight[0, 0].numel())
    layer.weight.data.copy_((grouped * per_group).reshape(weight.shape))


def level_outputs(layer: Any, norm: Any) -> None:
    """Give all output channels of a layer the same range; the BatchNorm after it makes up for it.

    ``weight /= s``, ``bias /= s``, ``mean /= s``, ``variance /= s^2``,
    ``gamma *= sqrt(variance + s^2 eps) / sqrt(variance + eps)``, with ``s = r / max r``

    The output of the BatchNorm does not change, whatever follows it.
    """
    ranges = output_ranges(layer, None)
    shares = ranges / ranges.max().clamp_min(torch.finfo(ranges.dtype).tiny)
    by = torch.where(ranges > 0, shares.clamp_min(SMALLEST), 1.0)
    scale_outputs(layer, None, by)
    variance = norm.running_var.clone()
    norm.weight.data *= ((variance + by.square() * norm.eps) / (variance + norm.eps)).sqrt()
    norm.running_mean /= by
    norm.running_var /= by.square()


def _rows(by: Tensor, weight: Tensor) -> Tensor:
    return by.view(-1, *[1] * (weight.dim() - 1))


def equalize(model: nn.Module) -> dict[str, str]:
    """Rescale channels so that weights fill their range, leaving the float function as it is.

    Between two layers with nothing but positively homogeneous operations between them (ReLU,
    LeakyReLU, PReLU, pooling, a linear bottleneck; not ReLU6, not a residual add), channel ``i``
    is divided by ``s_i = sqrt(r1_i / r2_i)`` behind the first and multiplied by it in the second,
    over all pairs until nothing changes. A BatchNorm behind the first takes the factor in gamma
    and beta. Where a layer has one scale for its whole weight and a BatchNorm takes its output,
    its channels are then brought to one range, for which the BatchNorm makes up, whatever the
    activation.

    Args:
        model: Any model; if quantized, the quantizers of layers that changed are uncalibrated
            afterwards.

    Returns:
        What was left alone, and why: blocks that torch.fx cannot trace.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", 2019, section 4.1.

    Example:
        >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 1))
        >>> _ = model[0].weight.data.fill_(8.0), model[2].weight.data.fill_(2.0)
        >>> equalize(model)
        {}
        >>> model[0].weight.item(), model[2].weight.item()
        (4.0, 4.0)
    """
    found = find_pairs(model)
    modules: dict[str, Any] = dict(model.named_modules())
    with torch.no_grad():
        _equalize_pairs(found.pairs, modules)
        levelled = [n for n in found.norms if _has_one_scale(modules[n])]
        for name in levelled:
            level_outputs(modules[name], modules[found.norms[name]])
    for name in {*levelled, *(n for p in found.pairs for n in (p.first, p.second))}:
        for quantizer in quantizers(modules[name]).values():
            quantizer.reset_parameters()
    return found.left


def _equalize_pairs(pairs: tuple[Pair, ...], modules: dict[str, Any]) -> None:
    for _ in range(MAX_ROUNDS):
        largest = 0.0
        for pair in pairs:
            first, second = modules[pair.first], modules[pair.second]
            norm = modules[pair.norm] if pair.norm else None
            by = pair_factors(output_ranges(first, norm), input_ranges(second))
            scale_outputs(first, norm, by)
            scale_inputs(second, by)
            largest = max(largest, float(by.log().abs().max()))
        if largest < TOLERANCE:
            break


def _has_one_scale(layer: Any) -> bool:
    quantizer = getattr(layer, "weight_quantizer", None)
    return quantizer is not None and quantizer.spec.needs_scale and quantizer.spec.axis is None
