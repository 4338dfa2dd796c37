"""On which samples a model is right."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lq.batches import check_batches, class_targets, model_inputs, tensors
from lq.modes import eval_mode


def rightness(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """Return on which samples a model predicts the target, ``[N]``.

    Raises:
        ValueError: If `batches` are empty or have no class numbers.
    """
    check_batches(batches)
    found = []
    with eval_mode(model):
        for batch in batches:
            args, kwargs = model_inputs(model, batch)
            output = tensors(model(*args, **kwargs))[0]
            target = class_targets(batch, output)
            if target is None or target.dim() != 1:
                raise ValueError(
                    "Expected `held_out` to be (input, target) pairs with class numbers, or "
                    f"mappings with labels, but got {type(batch).__name__}."
                )
            # What overflowed to NaN is right nowhere.
            found.append(((output.argmax(1) == target) & output.isfinite().all(1)).cpu())
    if not found:
        raise ValueError("Expected `held_out` to hold at least one batch, but got none.")
    return torch.cat(found)
