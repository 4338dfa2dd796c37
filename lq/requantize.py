"""Saving how a tensor was quantized for the backward pass, instead of the quantized tensor."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Way(NamedTuple):
    """A quantized tensor, what it was made from, the function that makes it, and whose it is."""

    quantized: Tensor
    source: Tensor
    make: Callable[[Tensor], Tensor]
    name: str


def requantizing(*ways: Way) -> AbstractContextManager[Any]:
    """Return a context in which operations that save a quantized tensor save how to make it.

    What it was made from is kept for the straight-through gradient anyway; so the copy is free
    again after the forward pass, and the backward pass makes it once more, bit for bit.
    """
    again = {
        way.quantized.data_ptr(): (way.quantized._version, _again(way))
        for way in ways
        if way.quantized is not way.source
    }

    def pack(saved: Tensor) -> Any:
        version, make = again.get(saved.data_ptr(), (None, None))
        # Linear saves its weight transposed: another view of the same memory. What was changed in
        # place since is not what would be made.
        return saved if saved._version != version else (make, saved.shape, saved.stride())

    def unpack(saved: Any) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        make, shape, stride = saved
        return make().as_strided(shape, stride)  # type: ignore[no-any-return]

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _again(way: Way) -> Callable[[], Tensor]:
    # Not the quantized tensor: that must be free after the forward pass.
    source, make, name = way.source.detach(), way.make, way.name
    version = source._version

    @torch.no_grad()
    def again() -> Tensor:
        if source._version != version:
            raise RuntimeError(
                f"Expected the input of {name!r} to stay as it was until the backward pass, but it "
                "was changed in place; change a copy, or do without save_memory."
            )
        return make(source)

    return again
