"""Scaled dot-product attention, as pure tensor functions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return attention's output and its weights.

    ``weights = softmax(query key^T / sqrt(D) + mask)``, ``output = weights value``

    Args:
        query: ``[N, heads, L, D]``.
        key: ``[N, heads, S, D]``.
        value: ``[N, heads, S, D]``.
        mask: Added to the products, broadcast to ``[N, heads, L, S]``.
        dropout: Share of the weights that is dropped.

    Example:
        >>> x = torch.ones(1, 1, 2, 4)
        >>> attend(x, x, x, None, 0.0)[1]
        tensor([[[[0.5000, 0.5000],
                  [0.5000, 0.5000]]]])
    """
    products = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    weights = (products if mask is None else products + mask).softmax(-1)
    weights = F.dropout(weights, dropout) if dropout else weights
    return weights @ value, weights


def merged_mask(
    attention: Tensor | None, padding: Tensor | None, like: Tensor, heads: int
) -> Tensor | None:
    """Return the masks of ``nn.MultiheadAttention`` as one that is added to the products.

    Args:
        attention: ``[L, S]`` or ``[N * heads, L, S]``; boolean, True where not to look, or added.
        padding: ``[N, S]``, likewise.
        like: Tensor whose type the mask has.
        heads: Number of heads.

    Example:
        >>> merged_mask(torch.tensor([[False, True]]), None, torch.ones(1), 1)
        tensor([[0., -inf]])
    """
    if attention is not None:
        attention = _added(attention, like)
        if attention.dim() == 3:
            attention = attention.view(-1, heads, *attention.shape[1:])
    if padding is None:
        return attention
    padding = _added(padding, like)[:, None, None, :]
    return padding if attention is None else attention + padding


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
