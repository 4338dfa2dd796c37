"""How much of what a model is given lies beyond the ranges that it was calibrated with."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lq.export.grid import Grid, input_grids
from lq.export.linter.linting import read
from lq.quantizer import Mode, Quantizer
from lq.surgery import input_quantizers

Counts = dict[str, tuple[int, int]]
"""Name -> how many values are beyond the range, and how many there are."""


def calibrated_inputs(path: str | Path) -> dict[str, Grid | None]:
    """Return input -> range of its first quantizer, as an ONNX file tells; ``None`` without one.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an ONNX model.
    """
    return input_grids(read(path))


def clip_counts(inputs: Mapping[str, Tensor], grids: Mapping[str, Grid | None]) -> Counts:
    """Return how much of each input lies beyond its range."""
    return {
        name: (clipped(inputs[name], grid), inputs[name].numel())
        for name, grid in grids.items()
        if grid is not None
    }


def clipped(x: Tensor, grid: Grid) -> int:
    """Return how many values have no code of their own, NaN among them.

    Example:
        >>> import onnx_ir as ir
        >>> grid = Grid(scale=0.01, zero_point=0, dtype=ir.DataType.INT8)
        >>> clipped(torch.tensor([-1.28, 1.27, 1.28, float("nan")]), grid)
        2
    """
    if not x.numel():
        return 0
    # A code grows with its value, so the ends tell whether there is anything to count.
    if x.is_cuda and _fit(torch.stack(x.aminmax()), grid).all():
        return 0
    # In numpy: torch's threads would wait for those of the engine.
    values = x.detach().float().cpu().numpy()
    if _fit(np.array([values.min(), values.max()]), grid).all():
        return 0
    return int(values.size - np.count_nonzero(_fit(values, grid)))


def _fit(values: Any, grid: Grid) -> Any:
    codes = (values / np.float32(grid.scale)).round() + np.float32(grid.zero_point)
    low, high = grid.codes
    return (codes >= low) & (codes <= high)


def working_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return the quantizers of a torch model, but those of weights, that have a range now."""
    return {
        name: quantizer
        for name, quantizer in input_quantizers(model).items()
        if quantizer.scale is not None and quantizer.mode is Mode.QUANTIZE
    }


@contextmanager
def counting(found: Mapping[str, Quantizer]) -> Iterator[Counts]:
    """Count what a torch model clips in this thread's next run, quantizer by quantizer."""
    counts: Counts = {}
    mine = threading.get_ident()

    def look(name: str) -> Any:
        def hook(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(quantizer, Quantizer)
            # The first time alone: what an addition is given next is quantized already.
            if threading.get_ident() == mine and name not in counts:
                counts[name] = int(quantizer.clipped(args[0]).sum()), args[0].numel()

        return hook

    hooks = [q.register_forward_pre_hook(look(name)) for name, q in found.items()]
    try:
        yield counts
    finally:
        for handle in hooks:
            handle.remove()
