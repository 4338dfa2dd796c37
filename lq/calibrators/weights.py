"""Ranges of weights, which take no data."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lq.functional import amax_along_axis, fake_quantize
from lq.spec import QuantSpec

MSE_CANDIDATES = 48
"""Ranges tried for a channel, at equal distances from a quarter of its largest magnitude to all."""


def weight_max_amax(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return the largest magnitude of a weight, per channel (``[C]``) or per tensor (``[]``).

    ``amax[c] = max_i |w[c, i]|``

    Args:
        weight: Weight of any shape.
        spec: How it is quantized; ``spec.axis`` is its channel axis.

    Example:
        >>> weight_max_amax(torch.tensor([[1.0, -3.0], [0.5, 0.25]]), QuantSpec(axis=0))
        tensor([3.0000, 0.5000])
    """
    return amax_along_axis(weight.detach(), spec.axis).float()


def weight_mse_amax(weight: Tensor, spec: QuantSpec) -> Tensor:
    """Return the range of each channel that minimises the squared error of a weight.

    ``amax[c] = argmin_a sum_i (w[c, i] - Q(w[c, i]; a))^2``, all channels at once, over
    `MSE_CANDIDATES` ranges; of equal ones the largest.

    Args:
        weight: Weight of any shape.
        spec: How it is quantized; ``spec.axis`` is its channel axis.

    Example:
        >>> weight_mse_amax(torch.tensor([[1.0, -3.0], [0.5, 0.25]]), QuantSpec("int2", axis=0))
        tensor([1.4202, 0.3723])
    """
    axis, weight = spec.axis, weight.detach().float()
    largest = weight_max_amax(weight, spec).view(-1)
    rows = weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)
    best, least = largest.clone(), torch.full_like(largest, torch.inf)
    for ratio in torch.linspace(0.25, 1, MSE_CANDIDATES, device=rows.device):
        scale = (ratio * largest / spec.qmax).clamp_min(torch.finfo(torch.float32).tiny)
        quantized = fake_quantize(rows, scale, spec.qmin, spec.qmax, axis=0)
        error = quantized.sub_(rows).square_().sum(1)
        better = error <= least
        best, least = torch.where(better, ratio * largest, best), torch.where(better, error, least)
    return best.view(()) if axis is None else best


WEIGHT_CALIBRATORS: dict[str, Callable[[Tensor, QuantSpec], Tensor]] = {
    "max": weight_max_amax,
    "mse": weight_mse_amax,
}
"""Calibrators of weights by name; where another is asked for, weights take ``max``."""
