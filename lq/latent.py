"""Latent weights: the float parameters behind quantized weights."""

from __future__ import annotations

from torch import Tensor, nn

from lq.layers import QuantLayer
from lq.surgery import quantized_layers


def latent_weight(layer: nn.Module) -> nn.Parameter | None:
    """Return the parameter behind a layer's weight, if the weight's values are its own.

    That is the weight itself, or what ``torch.nn.utils.prune`` masks; ``None`` for a weight that
    is computed in another way.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> latent_weight(layer) is layer.weight
        True
    """
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.Parameter):
        return weight
    return None if weight_mask(layer) is None else layer._parameters.get("weight_orig")


def weight_mask(layer: nn.Module) -> Tensor | None:
    """Return where a layer's weight is not pruned, if it is pruned at all."""
    mask: Tensor | None = getattr(layer, "weight_mask", None)
    return mask


def masked_weight(layer: nn.Module) -> Tensor:
    """Return what a layer's weight will be in its next forward: zero where it is pruned."""
    weight = latent_weight(layer)
    assert weight is not None
    mask = weight_mask(layer)
    return weight.detach() if mask is None else weight.detach() * mask


def latent_layers(model: nn.Module) -> tuple[dict[str, QuantLayer], list[str]]:
    """Return the quantized layers that have a latent weight, and the names of the others.

    Of layers that share a weight, the first stands for all.

    Example:
        >>> from lq import quantize
        >>> layers, others = latent_layers(quantize(nn.Linear(16, 4), {"weights": "int4"}))
        >>> list(layers), others
        ([''], [])
    """
    layers: dict[int, tuple[str, QuantLayer]] = {}
    others = []
    for name, layer in quantized_layers(model).items():
        weight = latent_weight(layer)
        if weight is None:
            others.append(name)
        else:
            layers.setdefault(id(weight), (name, layer))
    return dict(layers.values()), others
