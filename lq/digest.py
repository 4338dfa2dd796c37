"""Hashes that tell whether data or a model is the same as before."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lq.ranks import gathered
from lq.state import recipe_of


class DataDigest:
    """Hashes the inputs of batches as they come by, on all ranks together.

    Example:
        >>> digest = DataDigest()
        >>> digest.add((torch.zeros(2),), {})
        >>> digest.hexdigest()[:8]
        '...'
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
        """Take in the inputs of one batch."""
        for name, value in [*(("", value) for value in args), *sorted(kwargs.items())]:
            self._hash.update(name.encode())
            self._hash.update(_content(value))

    @property
    def own(self) -> str:
        """The hash of everything that this process has taken in so far."""
        return self._hash.hexdigest()

    def hexdigest(self) -> str:
        """Return the hash of everything so far."""
        parts = gathered(self.own)
        if len(parts) == 1:
            return self.own
        return hashlib.sha256("".join(parts).encode()).hexdigest()


def model_digest(model: nn.Module) -> str:
    """Return the hash of a quantized model's recipe, parameters and buffers, less its ranges."""
    digest = hashlib.sha256()
    recipe = recipe_of(model)
    digest.update(recipe.to_json().encode() if recipe is not None else b"")
    for name, value in sorted([*model.named_parameters(), *model.named_buffers()]):
        if not name.endswith(("quantizer.scale", "quantizer.offset")):
            digest.update(name.encode())
            digest.update(_content(value))
    return digest.hexdigest()


def _content(value: Any) -> bytes:
    if isinstance(value, Mapping):
        return b"".join(str(k).encode() + _content(v) for k, v in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return b"".join(map(_content, value))
    if not isinstance(value, Tensor):
        return repr(value).encode()
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{value.dtype}{list(value.shape)}".encode() + np.ascontiguousarray(raw).tobytes()
