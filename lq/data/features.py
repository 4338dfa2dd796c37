"""What coverage compares images by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lq.batches import model_inputs
from lq.data.reading import LabelledImage
from lq.modes import eval_mode, quantizer_mode
from lq.quantizer import Mode

Features = Callable[[Tensor], Tensor]


def pooled_pixels(images: Tensor) -> Tensor:
    """Return the mean of each channel in each field of a 4x4 grid: ``[N, C, H, W] -> [N, 16 C]``.

    Example:
        >>> pooled_pixels(torch.ones(2, 3, 32, 32)).shape
        torch.Size([2, 48])
    """
    return F.adaptive_avg_pool2d(images, 4).flatten(1)


def pooled_features(batches: Iterable[list[LabelledImage]], features: Features) -> Tensor:
    """Return a row of features for each image, float32 ``[N, D]``.

    Feature maps ``[N, C, H, W]`` are averaged over positions. A module runs in float, in eval
    mode, on its own device, and is left in the mode it was.

    Raises:
        ValueError: If there is not one row of finite features for each image.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if isinstance(features, nn.Module):
            stack.enter_context(eval_mode(features))
            stack.enter_context(quantizer_mode(features, Mode.BYPASS))
        return torch.cat([_rows(torch.stack([x for x, _ in b]), features) for b in batches])


def _rows(images: Tensor, features: Features) -> Tensor:
    if isinstance(features, nn.Module):
        (images,), _ = model_inputs(features, images)
    rows = features(images)
    if not isinstance(rows, Tensor) or rows.shape[:1] != images.shape[:1]:
        got = list(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(
            f"Expected `features` to give a row for each of {len(images)} images, but got {got}."
        )
    if not bool(rows.isfinite().all()):
        raise ValueError("Expected `features` to be finite, but got NaN or infinity.")
    rows = rows.mean((2, 3)) if rows.dim() == 4 else rows.flatten(1)
    return rows.float().cpu()
