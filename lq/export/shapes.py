"""Which axes of a model's inputs may vary."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

IMAGE_AXES = (2, 3)
LARGER = 64
"""Pixels that are added to a sample to see if a model runs it; a multiple of most strides."""


def two_or_more(x: Any) -> Any:
    """Repeat a batch of one: the exporter takes a size of one for a constant."""
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() and x.shape[0] == 1 else x


def dynamic_shapes(args: tuple[Any, ...], kwargs: dict[str, Any], batch: bool, image: bool) -> Any:
    """Return the varying axes of all inputs as ``torch.onnx.export`` wants them."""
    if not batch and not image:
        return None
    first = torch.export.Dim("batch")

    def shape(x: Any) -> dict[int, Any] | None:
        if not isinstance(x, Tensor) or not x.dim():
            return None
        axes: dict[int, Any] = {0: first} if batch else {}
        if image and _is_image(x):
            # The exporter finds out what a model asks of them: multiples of its stride, say.
            axes |= {axis: torch.export.Dim.AUTO for axis in IMAGE_AXES}
        return axes

    if kwargs:
        return {name: shape(x) for name, x in kwargs.items()}
    return tuple(shape(x) for x in args)


def check_other_image(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise a ``ValueError`` if a model cannot run images of another size than the sample's."""
    try:
        model(*map(_larger, args), **{name: _larger(x) for name, x in kwargs.items()})
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(
            f"Expected a model that runs images of any size, but it fails {LARGER} pixels beyond "
            f"the sample's: {' '.join(str(error).split())[:200]}; export it with "
            "dynamic_image=False."
        ) from None


def _larger(x: Any) -> Any:
    return torch.nn.functional.pad(x, (0, LARGER, 0, LARGER)) if _is_image(x) else x


def _is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4


def check_image_varies(graph: ir.Graph) -> None:
    """Raise a ``ValueError`` if the exporter took height or width for a constant."""
    for value in graph.inputs:
        shape = value.shape
        sizes = list(shape)[2:] if shape is not None and len(shape) == 4 else []
        if any(isinstance(size, int) for size in sizes):
            raise ValueError(
                f"Expected height and width of input {value.name!r} to vary, but the model "
                f"computes with {sizes} as constants; export it with dynamic_image=False."
            )
