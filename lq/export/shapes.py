"""Which axes of a model's inputs may vary."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

IMAGE_AXES = (2, 3)


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
        if image and x.dim() == 4:
            # The exporter finds out what a model asks of them: multiples of its stride, say.
            axes |= {axis: torch.export.Dim.AUTO for axis in IMAGE_AXES}
        return axes

    if kwargs:
        return {name: shape(x) for name, x in kwargs.items()}
    return tuple(shape(x) for x in args)


def check_image_varies(graph: ir.Graph) -> None:
    """Raise a ``ValueError`` if an exporter found that height or width cannot vary."""
    for value in graph.inputs:
        shape = value.shape
        if shape is not None and len(shape) == 4:
            fixed = [shape[axis] for axis in IMAGE_AXES if isinstance(shape[axis], int)]
            if fixed:
                raise ValueError(
                    f"Expected height and width of input {value.name!r} to vary, but the model "
                    f"works for {list(shape[2:])} only; export it with dynamic_image=False."
                )
