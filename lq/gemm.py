"""How large the matrix product of a layer is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

TENSOR_CORE = 16
"""Products with fewer rows or columns than this gain nothing from integer tensor cores."""


def weight_of(layer: nn.Module) -> Tensor | None:
    """Return the matrix a layer multiplies by; of ``nn.MultiheadAttention`` that of its inputs.

    Example:
        >>> weight_of(nn.MultiheadAttention(8, 2)).shape
        torch.Size([24, 8])
    """
    name = "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"
    weight = getattr(layer, name, None)
    return weight if isinstance(weight, Tensor) else None


def gemm_size(layer: nn.Module) -> tuple[int, int] | None:
    """Return the size ``(K, N)`` of a layer's product in each group, ``None`` without a weight.

    A convolution is the product of ``[pixels, K]`` by ``[K, N]``, with ``K`` inputs times kernel
    size and ``N`` outputs.

    Example:
        >>> gemm_size(nn.Conv2d(8, 32, 3))
        (72, 32)
        >>> gemm_size(nn.Conv2d(32, 32, 3, groups=32))
        (9, 1)
    """
    weight = weight_of(layer)
    if weight is None or weight.dim() < 2:
        return None
    groups, transposed = getattr(layer, "groups", 1), getattr(layer, "transposed", False)
    return product_size(weight.shape, groups, transposed)


def product_size(
    shape: Sequence[int], groups: int = 1, transposed: bool = False
) -> tuple[int, int]:
    """Return ``(K, N)`` of a weight ``[N, K / groups, ...]``, transposed ``[K, N / groups, ...]``.

    Example:
        >>> product_size((32, 1, 3, 3), groups=32)
        (9, 1)
    """
    rows, columns, *rest = shape
    kernel = math.prod(rest)
    if transposed:
        return rows // groups * kernel, columns
    return columns * kernel, rows // groups


def is_small(layer: nn.Module) -> bool:
    """Return whether integer tensor cores bring a layer nothing."""
    size = gemm_size(layer)
    return size is not None and min(size) < TENSOR_CORE
