"""How much of what a model is given lies beyond the ranges that it was calibrated with."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    low, high = grid.codes
    if not x.numel():
        return 0
    # A code grows with its value, so the ends tell whether there is anything to count.
    ends = _codes(torch.stack(torch.aminmax(x)), grid)
    if bool((ends >= low).all() & (ends <= high).all()):
        return 0
    codes = _codes(x, grid)
    return x.numel() - int(((codes >= low) & (codes <= high)).sum())


def _codes(x: Tensor, grid: Grid) -> Tensor:
    return (x.float() / grid.scale).round_() + grid.zero_point


def working_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return the quantizers of a torch model, but those of weights, that have a range now."""
    return {
        name: quantizer
        for name, quantizer in input_quantizers(model).items()
        if quantizer.scale is not None and quantizer.mode is Mode.QUANTIZE
    }


@contextmanager
def counting(found: Mapping[str, Quantizer]) -> Iterator[Counts]:
    """Count what this thread's runs of a torch model clip, quantizer by quantizer, for a while."""
    counts: Counts = {}
    mine = threading.get_ident()

    def look(name: str) -> Any:
        def hook(quantizer: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(quantizer, Quantizer)
            if threading.get_ident() == mine:
                beyond, total = counts.get(name, (0, 0))
                x = args[0]
                counts[name] = beyond + int(quantizer.clipped(x).sum()), total + x.numel()

        return hook

    hooks = [q.register_forward_pre_hook(look(name)) for name, q in found.items()]
    try:
        yield counts
    finally:
        for handle in hooks:
            handle.remove()
