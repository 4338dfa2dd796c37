"""Saving how a tensor was quantized for the backward pass, instead of the quantized tensor."""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lq.quantizer import Quantizer


def requantizing(*ways: tuple[Tensor, Tensor, Quantizer]) -> AbstractContextManager[Any]:
    """Return a context in which operations that save a quantized tensor save how to make it.

    What it was made from is kept for the straight-through gradient anyway; so the copy is free
    again after the forward pass, and the backward pass makes it once more, bit for bit.

    Args:
        ways: Quantized tensors, each with what it was made from and by which quantizer.
    """
    again = {
        quantized.data_ptr(): _way(source.detach(), quantizer)
        for quantized, source, quantizer in ways
        if quantized is not source
    }

    def pack(saved: Tensor) -> Any:
        way = again.get(saved.data_ptr())
        # Linear saves its weight transposed: another view of the same memory.
        return saved if way is None else (way, saved.shape, saved.stride())

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        way, shape, stride = saved
        return way().as_strided(shape, stride)  # type: ignore[no-any-return]

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _way(source: Tensor, quantizer: Quantizer) -> partial[Tensor]:
    scale = quantizer.scale
    # A copy: a moving average has moved on, and an optimizer may, before the backward pass.
    kept = None if scale is None else scale.detach().clone()
    return partial(_quantize, quantizer, source, source._version, kept)


@torch.no_grad()
def _quantize(quantizer: Quantizer, x: Tensor, version: int, scale: Tensor | None) -> Tensor:
    if x._version != version:
        raise RuntimeError(
            f"Expected the input of {quantizer.name!r} to stay as it was until the backward pass, "
            "but it was changed in place; change a copy, or do without save_memory."
        )
    return quantizer(x) if scale is None else quantizer.quantize(x, scale)
